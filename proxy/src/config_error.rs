//! Why a piece of configuration cannot be used, and where in it the fault lies.

/// A refusal: the path names the resource and the field, the reason goes into the NACK.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{path}: {reason}")]
pub struct ConfigError {
    /// From the outside in: `listener x: filter_chains[0]: transport_socket`.
    pub path: String,
    /// What is wrong with it.
    pub reason: String,
}

impl ConfigError {
    /// A refusal of what `path` names.
    pub fn new(path: impl Into<String>, reason: impl Into<String>) -> ConfigError {
        ConfigError {
            path: path.into(),
            reason: reason.into(),
        }
    }

    /// Puts the name of the enclosing thing before the path.
    #[must_use]
    pub fn within(self, outer: impl std::fmt::Display) -> ConfigError {
        ConfigError {
            path: if self.path.is_empty() {
                outer.to_string()
            } else {
                format!("{outer}: {}", self.path)
            },
            reason: self.reason,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_path_grows_outwards() {
        let error = ConfigError::new("port_value", "0 is no port")
            .within("address")
            .within("listener l");
        assert_eq!(
            error.to_string(),
            "listener l: address: port_value: 0 is no port"
        );
    }
}
