//! Instances as rules send them: of a template that is part of this program, or of one that an object of kind
//! `template` describes.

use std::sync::Arc;

use lateen_adapter::{
    ValueType, Variety,
    instance::{
        CheckInstance, CheckOutputInstance, GenerateInstance, QuotaInstance, ReportInstance,
    },
};
use lateen_engine::{Bag, Slot, Tracker};

use super::{instance::Instance, remote::instance::RemoteInstance};
use crate::instance::{Encoded, Found, Made};

/// An instance that a rule sends.
#[derive(Clone, Debug)]
pub enum Sent {
    /// For adapters that are part of this program.
    Compiled(Arc<Instance>),
    /// For adapters that are processes of their own.
    Remote(Arc<RemoteInstance>),
}

impl Sent {
    /// `NAME.KIND.NAMESPACE`.
    pub fn name(&self) -> &Arc<str> {
        match self {
            Self::Compiled(instance) => &instance.name,
            Self::Remote(instance) => &instance.name,
        }
    }

    /// What its template is for.
    pub fn variety(&self) -> Variety {
        match self {
            Self::Compiled(instance) => instance.template.variety,
            Self::Remote(instance) => instance.template.variety,
        }
    }

    /// Name of its template.
    pub fn template(&self) -> &str {
        match self {
            Self::Compiled(instance) => instance.template.name,
            Self::Remote(instance) => &instance.template.name,
        }
    }

    /// Whether a request that asks for quota `name` means this instance: by its short or its full name.
    pub fn is_called(&self, name: &str) -> bool {
        let (short_name, full_name) = match self {
            Self::Compiled(instance) => (&instance.short_name, &instance.name),
            Self::Remote(instance) => (&instance.short_name, &instance.name),
        };
        short_name.eq_ignore_ascii_case(name) || full_name.eq_ignore_ascii_case(name)
    }

    /// What a check of it finds out, by name and type.
    pub fn outputs(&self) -> Vec<(Arc<str>, ValueType)> {
        match self {
            Self::Compiled(instance) => {
                let outputs = instance.template.outputs.iter();
                outputs.map(|(name, ty)| (Arc::from(*name), *ty)).collect()
            }
            Self::Remote(instance) => {
                let outputs = instance.template.output.iter().flat_map(|o| o.fields());
                outputs.map(|(name, ty)| (Arc::clone(name), ty)).collect()
            }
        }
    }

    /// The instance for a request.
    ///
    /// # Errors
    /// A field has no value.
    pub fn make(&self, bag: &Bag, tracker: &mut Tracker) -> Result<Made, String> {
        let instance = match self {
            Self::Remote(instance) => {
                let message = instance.encode(bag, tracker).map_err(|e| e.to_string())?;
                return Ok(Made::Remote(Encoded {
                    instance: Arc::clone(instance),
                    message: message.into(),
                }));
            }
            Self::Compiled(instance) => instance,
        };
        let fields = instance.evaluate(bag, tracker).map_err(|e| e.to_string())?;
        let (template, name) = (instance.template, Arc::clone(&instance.name));
        let made = match template.variety {
            Variety::Check => CheckInstance::new(template, name, fields).map(Made::Check),
            Variety::CheckWithOutput => {
                CheckOutputInstance::new(template, name, fields).map(Made::CheckOutput)
            }
            Variety::Report => ReportInstance::new(template, name, fields).map(Made::Report),
            Variety::Quota => QuotaInstance::new(template, name, fields).map(Made::Quota),
            Variety::AttributeGenerator => {
                GenerateInstance::new(template, name, fields).map(Made::Generate)
            }
        };
        made.map_err(|e| e.to_string())
    }

    /// Puts what a generator found into the generated layer.
    pub fn bind(&self, found: Found, bag: &mut Bag) {
        match (self, found) {
            (Self::Compiled(instance), Found::Compiled(output)) => instance.bind(output, bag),
            (Self::Remote(instance), Found::Remote(output)) => instance.bind(output, bag),
            // Handlers get only what they take.
            (Self::Compiled(_), Found::Remote(_)) | (Self::Remote(_), Found::Compiled(_)) => {}
        }
    }

    /// The attributes it may generate.
    pub fn writes(&self) -> Vec<Slot> {
        match self {
            Self::Compiled(instance) => instance.writes(),
            Self::Remote(instance) => instance.writes(),
        }
    }

    /// The attributes it generates, whatever the generator finds.
    pub fn generated(&self) -> Vec<Slot> {
        match self {
            Self::Compiled(instance) => instance.generated(),
            Self::Remote(instance) => instance.generated(),
        }
    }

    /// Whether both are the same instance.
    pub fn same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Compiled(a), Self::Compiled(b)) => Arc::ptr_eq(a, b),
            (Self::Remote(a), Self::Remote(b)) => Arc::ptr_eq(a, b),
            (Self::Compiled(_), Self::Remote(_)) | (Self::Remote(_), Self::Compiled(_)) => false,
        }
    }
}
