//! What a workload asks for by its annotations, read and checked.

use ipnet::IpNet;
use serde_json::{Map, Value, json};

use crate::{InjectError, settings::Settings};

/// A pod's annotations.
#[derive(Clone, Debug)]
pub(crate) struct Annotations(Map<String, Value>);

impl Annotations {
    pub(crate) fn of(pod: &Value) -> Annotations {
        let map = pod.pointer("/metadata/annotations");
        Annotations(map.and_then(Value::as_object).cloned().unwrap_or_default())
    }

    /// The text of an annotation; Kubernetes has only texts, people forget quotes.
    pub(crate) fn text(&self, name: &str) -> Option<String> {
        self.0.get(name).map(|value| match value {
            Value::String(text) => text.clone(),
            other => other.to_string(),
        })
    }

    pub(crate) fn flag(&self, name: &str) -> Result<Option<bool>, InjectError> {
        match self.text(name).as_deref() {
            None => Ok(None),
            Some("true" | "True" | "TRUE" | "1" | "t" | "T") => Ok(Some(true)),
            Some("false" | "False" | "FALSE" | "0" | "f" | "F") => Ok(Some(false)),
            Some(other) => Err(refuse(name, format!("{other:?} is neither true nor false"))),
        }
    }

    pub(crate) fn number(&self, name: &str) -> Result<Option<u32>, InjectError> {
        let parse = |text: String| {
            text.parse()
                .map_err(|_| refuse(name, format!("{text:?} is no whole number")))
        };
        self.text(name).map(parse).transpose()
    }

    /// A map in JSON: names to things of Kubernetes.
    pub(crate) fn things(&self, name: &str) -> Result<Map<String, Value>, InjectError> {
        let Some(text) = self.text(name) else {
            return Ok(Map::new());
        };
        match serde_json::from_str(&text) {
            Ok(Value::Object(map)) => Ok(map),
            // Istio takes a list of things with names as well.
            Ok(Value::Array(items)) => {
                let named = items
                    .into_iter()
                    .filter_map(|item| Some((item.get("name")?.as_str()?.to_owned(), item)));
                Ok(named.collect())
            }
            Ok(_) => Err(refuse(name, "is no JSON map".to_owned())),
            Err(error) => Err(refuse(name, format!("is not JSON: {error}"))),
        }
    }

    /// `proxy.istio.io/config`.
    pub(crate) fn proxy_config(&self) -> Result<Value, InjectError> {
        const NAME: &str = "proxy.istio.io/config";
        let Some(text) = self.text(NAME) else {
            return Ok(json!({}));
        };
        let value: Value = serde_saphyr::from_str(&text)
            .map_err(|error| refuse(NAME, format!("is not YAML: {error}")))?;
        match value {
            Value::Null => Ok(json!({})),
            Value::Object(_) => Ok(value),
            _ => Err(refuse(NAME, "is no map".to_owned())),
        }
    }

    /// `resources` of the sidecar: as the annotations say, or else the settings.
    pub(crate) fn resources(&self, settings: &Settings) -> Value {
        let mut said = json!({});
        for (name, part, resource) in [
            ("sidecar.istio.io/proxyCPU", "requests", "cpu"),
            ("sidecar.istio.io/proxyMemory", "requests", "memory"),
            ("sidecar.istio.io/proxyCPULimit", "limits", "cpu"),
            ("sidecar.istio.io/proxyMemoryLimit", "limits", "memory"),
        ] {
            if let Some(amount) = self.text(name) {
                said[part][resource] = json!(amount);
            }
        }
        match said.as_object().is_some_and(|said| said.is_empty()) {
            true => settings.resources.clone(),
            // As Istio: who says one of them says all.
            false => said,
        }
    }
}

fn refuse(name: &str, reason: String) -> InjectError {
    InjectError::Annotation {
        name: name.to_owned(),
        reason,
    }
}

/// Which traffic goes through the sidecar: arguments of `proxy iptables apply`.
pub(crate) fn interception(
    annotations: &Annotations,
    settings: &Settings,
    mode: &str,
    status_port: u16,
) -> Result<Vec<String>, InjectError> {
    let said = |name: &str, default: &str| -> (String, String) {
        let name = format!("traffic.sidecar.istio.io/{name}");
        let value = annotations.text(&name);
        (name, value.unwrap_or_else(|| default.to_owned()))
    };
    let checked = |(name, value): (String, String), check: fn(&str) -> bool, what: &str| {
        let words = value
            .split(',')
            .map(str::trim)
            .filter(|word| !word.is_empty());
        let words: Vec<&str> = words.collect();
        match words.iter().find(|word| !check(word)) {
            Some(wrong) => Err(refuse(&name, format!("{wrong:?} is {what}"))),
            None => Ok(words.join(",")),
        }
    };
    let port = |word: &str| word.parse::<u16>().is_ok();
    let port_or_all = |word: &str| word == "*" || word.parse::<u16>().is_ok();
    let range = |word: &str| word.parse::<IpNet>().is_ok();
    let range_or_all = |word: &str| word == "*" || word.parse::<IpNet>().is_ok();
    let interface = |word: &str| word.len() <= 15 && word.bytes().all(|b| b.is_ascii_graphic());

    let include_ranges = checked(
        said(
            "includeOutboundIPRanges",
            &settings.include_outbound_ip_ranges,
        ),
        range_or_all,
        "neither a CIDR range nor `*`",
    )?;
    let exclude_ranges = checked(
        said(
            "excludeOutboundIPRanges",
            &settings.exclude_outbound_ip_ranges,
        ),
        range,
        "no CIDR range",
    )?;
    let include_inbound = checked(
        said("includeInboundPorts", &settings.include_inbound_ports),
        port_or_all,
        "neither a port nor `*`",
    )?;
    let exclude_inbound = checked(
        said("excludeInboundPorts", &settings.exclude_inbound_ports),
        port,
        "no port",
    )?;
    let mut excluded = vec!["15090".to_owned(), "15021".to_owned()];
    let own = status_port.to_string();
    let more = exclude_inbound.split(',').map(str::to_owned);
    for port in more.chain(std::iter::once(own)) {
        if !port.is_empty() && port != "0" && !excluded.contains(&port) {
            excluded.push(port);
        }
    }
    let excluded = excluded.join(",");
    let mut arguments: Vec<String> = [
        "iptables",
        "apply",
        "-p",
        "15001",
        "-z",
        "15006",
        "-u",
        "1337",
        "-g",
        "1337",
        "-m",
        mode,
        "-i",
        &include_ranges,
        "-x",
        &exclude_ranges,
        "-b",
        &include_inbound,
        "-d",
        &excluded,
    ]
    .map(str::to_owned)
    .to_vec();
    for (flag, name, default, check, what) in [
        (
            "-q",
            "includeOutboundPorts",
            settings.include_outbound_ports.as_str(),
            port as fn(&str) -> bool,
            "no port",
        ),
        (
            "-o",
            "excludeOutboundPorts",
            settings.exclude_outbound_ports.as_str(),
            port,
            "no port",
        ),
        ("-c", "excludeInterfaces", "", interface, "no interface"),
        ("-k", "kubevirtInterfaces", "", interface, "no interface"),
    ] {
        let value = checked(said(name, default), check, what)?;
        if !value.is_empty() {
            arguments.extend([flag.to_owned(), value]);
        }
    }
    Ok(arguments)
}
