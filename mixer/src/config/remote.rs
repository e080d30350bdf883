//! Adapters that are processes of their own, and the templates they take: objects of kind `adapter` and
//! `template`, each with a protobuf descriptor inside. Nothing compiled in is needed to check handlers and
//! instances of them and to encode what they get ([`instance`], [`handler`]).
//!
//! reference: istio.io/api `mixer/adapter/model/v1beta1` (`Info`, `Template`, `extensions.proto`).

pub mod encode;
pub mod handler;
pub mod instance;
pub mod output;
pub mod types;

use std::{
    collections::BTreeSet,
    fmt,
    sync::{Arc, LazyLock},
};

use base64::Engine as _;
use http::uri::PathAndQuery;
use lateen_adapter::Variety;
use lateen_engine::AttributeTable;
use prost::Message as _;
use prost_reflect::{DescriptorPool, FileDescriptor, MessageDescriptor, MethodDescriptor};
use serde::Deserialize;
use serde_json::Value as Json;

use self::output::OutputPlan;
use super::object::{Fault, Key, Source};

/// The number of the field `name` that Mixer fills in each instance.
pub const NAME_FIELD: u32 = 72_295_727;
/// Largest descriptor, in bytes as written.
const MAX_DESCRIPTOR_BYTES: usize = 4 << 20;

/// A template described by an object of kind `template`.
#[derive(Debug)]
pub struct RemoteTemplate {
    /// `NAME.template.NAMESPACE`.
    pub name: Arc<str>,
    /// As written.
    pub source: Source,
    /// Whether it is one of Istio's that no object describes.
    pub is_built_in: bool,
    /// What the descriptor calls it, as adapters may do too.
    pub template_name: String,
    /// What its instances are for.
    pub variety: Variety,
    /// What an adapter gets.
    pub instance: MessageDescriptor,
    /// The types of an instance's fields, as a session is told them; `None`: the descriptor has no such message.
    pub types: Option<MessageDescriptor>,
    /// What an adapter returns besides its verdict.
    pub output: Option<OutputPlan>,
    /// The path of the call, `/PACKAGE.SERVICE/METHOD`.
    pub path: PathAndQuery,
    /// Where the parts of a call stand.
    pub numbers: Numbers,
}

/// The numbers of the fields in the request and the response of a template's method.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Numbers {
    /// `instance`, or for reports `instances`.
    pub instance: u32,
    /// `adapter_config`.
    pub adapter_config: u32,
    /// `dedup_id`.
    pub dedup_id: u32,
    /// `quota_request`.
    pub quota_request: u32,
    /// `result` of a check with output.
    pub result: u32,
    /// `output` of a check with output.
    pub output: u32,
}

/// An adapter described by an object of kind `adapter`.
#[derive(Debug)]
pub struct RemoteAdapter {
    /// `NAME.adapter.NAMESPACE`.
    pub name: Arc<str>,
    /// As written.
    pub source: Source,
    /// Its namespace, in which its templates are looked for.
    pub namespace: Arc<str>,
    /// For people.
    pub description: String,
    /// Templates it takes, as rules would name them.
    pub templates: Vec<String>,
    /// Whether it wants a session for each handler instead of the parameters with each call.
    pub session_based: bool,
    /// The message its parameters are; `None`: it takes none.
    pub params: Option<MessageDescriptor>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct RawTemplate {
    descriptor: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct RawAdapter {
    #[allow(dead_code, reason = "the object's name counts")]
    name: Option<String>,
    description: Option<String>,
    templates: Vec<String>,
    config: Option<String>,
    #[serde(alias = "session_based")]
    session_based: bool,
}

/// A spec in its raw form; a field that is written without a value is one that is not written.
fn raw<T: Default + for<'de> Deserialize<'de>>(spec: &Json) -> Result<T, Fault> {
    let written = match spec {
        Json::Null => return Ok(T::default()),
        Json::Object(fields) => {
            let written = fields.iter().filter(|(_, value)| !value.is_null());
            Json::Object(written.map(|(k, v)| (k.clone(), v.clone())).collect())
        }
        other => return Err(Fault::new("", format!("{other} is no map"))),
    };
    T::deserialize(&written).map_err(|error| Fault::new("", error))
}

impl RemoteTemplate {
    /// Reads an object of kind `template`.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn read(source: &Source) -> Result<Self, Fault> {
        let at = |reason: &dyn fmt::Display| Fault::new("descriptor", reason);
        let raw: RawTemplate = raw(&source.spec)?;
        let text = raw.descriptor.filter(|d| !d.trim().is_empty());
        let text = text.ok_or_else(|| at(&"the template has no descriptor"))?;
        let pool = pool(&text).map_err(|reason| at(&reason))?;
        // The file of the template is the last one that says it is one; those before are what it imports.
        let mut found = None;
        for file in pool.files() {
            let options = Options::of(&file).map_err(|reason| at(&reason))?;
            if options.is_template() {
                found = Some((file, options));
            }
        }
        let (file, options) = found.ok_or_else(|| {
            at(&"no file of the descriptor has the option istio.mixer.adapter.model.v1beta1.template_name")
        })?;
        Self::of(source, &pool, &file, options)
    }

    /// Istio's template `name`, for whom no object describes it; `namespace` is where it counts.
    pub fn built_in(name: &str, namespace: &str) -> Option<Self> {
        static POOL: LazyLock<DescriptorPool> = LazyLock::new(|| {
            DescriptorPool::decode(lateen_protocols::TEMPLATES)
                .expect("it is compiled with this program")
        });
        let (file, options) = POOL.files().find_map(|file| {
            let options = Options::of(&file).ok()?;
            (options.name.as_deref() == Some(name)).then_some((file, options))
        })?;
        let source = Source {
            key: Key {
                kind: Arc::from("template"),
                namespace: Arc::from(namespace),
                name: Arc::from(name),
            },
            annotations: Arc::default(),
            spec: Arc::new(Json::Null),
            origin: None,
        };
        Self::of(&source, &POOL, &file, options).ok()
    }

    fn of(
        source: &Source,
        pool: &DescriptorPool,
        file: &FileDescriptor,
        options: Options,
    ) -> Result<Self, Fault> {
        let at = |reason: &dyn fmt::Display| Fault::new("descriptor", reason);
        let package = file.package_name().to_owned();
        let message = |name: &str| pool.get_message_by_name(&format!("{package}.{name}"));
        let instance = message("InstanceMsg").ok_or_else(|| {
            at(&format_args!(
                "{package} has no message InstanceMsg; make the descriptor with mixgen template"
            ))
        })?;
        let method = file
            .services()
            .flat_map(|service| service.methods().collect::<Vec<_>>())
            .find(|method| method.name().starts_with("Handle"))
            .ok_or_else(|| at(&format_args!("{package} has no service Handle…Service")))?;
        let output = message("OutputMsg");
        let variety = match options.variety.unwrap_or(0) {
            0 => Variety::Check,
            1 => Variety::Report,
            2 => Variety::Quota,
            3 => Variety::AttributeGenerator,
            4 => Variety::CheckWithOutput,
            other => return Err(at(&format_args!("template_variety {other} is not known"))),
        };
        let output = match (variety, output) {
            (Variety::Check | Variety::Report | Variety::Quota, _) => None,
            (Variety::AttributeGenerator | Variety::CheckWithOutput, None) => {
                return Err(at(&format_args!("{package} has no message OutputMsg")));
            }
            (Variety::AttributeGenerator | Variety::CheckWithOutput, Some(output)) => {
                Some(OutputPlan::of(output).map_err(|reason| at(&reason))?)
            }
        };
        let path = format!("/{}/{}", method.parent_service().full_name(), method.name());
        Ok(Self {
            name: source.key.full_name(),
            source: source.clone(),
            is_built_in: source.spec.is_null(),
            types: message("Type"),
            template_name: options.name.unwrap_or(package.clone()),
            variety,
            numbers: Numbers::of(&method, variety, &instance).map_err(|reason| at(&reason))?,
            instance,
            output,
            path: path.parse().map_err(|error| at(&error))?,
        })
    }

    /// What a generator of this template finds, as attributes `output.NAME`.
    pub fn generated_outputs(&self) -> Option<&AttributeTable> {
        let output = self.output.as_ref()?;
        (self.variety == Variety::AttributeGenerator).then_some(&output.table)
    }
}

impl Numbers {
    /// By the descriptor; what it does not say is as Istio's generator writes it.
    fn of(
        method: &MethodDescriptor,
        variety: Variety,
        instance: &MessageDescriptor,
    ) -> Result<Self, String> {
        let (request, response) = (method.input(), method.output());
        let name = match variety {
            Variety::Report => "instances",
            _ => "instance",
        };
        let field = request.get_field_by_name(name);
        let is_right = field.as_ref().is_some_and(|field| {
            field.is_list() == (variety == Variety::Report)
                && field.kind().as_message() == Some(instance)
        });
        if !is_right {
            return Err(format!(
                "{} has no field {name} of {}",
                request.full_name(),
                instance.full_name()
            ));
        }
        let number = |message: &MessageDescriptor, name: &str, usual: u32| {
            message
                .get_field_by_name(name)
                .map_or(usual, |f| f.number())
        };
        Ok(Self {
            instance: number(&request, name, 1),
            adapter_config: number(&request, "adapter_config", 2),
            dedup_id: number(&request, "dedup_id", 3),
            quota_request: number(&request, "quota_request", 4),
            result: number(&response, "result", 1),
            output: number(&response, "output", 2),
        })
    }
}

impl RemoteAdapter {
    /// Reads an object of kind `adapter`.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn read(source: &Source) -> Result<Self, Fault> {
        let raw: RawAdapter = raw(&source.spec)?;
        let mut seen = BTreeSet::new();
        for (i, template) in raw.templates.iter().enumerate() {
            if template.is_empty() || !seen.insert(template) {
                let reason = format!("{template:?} is empty or there twice");
                return Err(Fault::new(format!("templates[{i}]"), reason));
            }
        }
        let params = match raw.config.filter(|c| !c.trim().is_empty()) {
            None => None,
            Some(text) => {
                let pool = pool(&text).map_err(|reason| Fault::new("config", reason))?;
                // The adapter's own file is the last; those before are what it imports.
                let own = pool
                    .files()
                    .filter_map(|file| file.messages().find(|message| message.name() == "Params"));
                let params = own
                    .last()
                    .ok_or_else(|| Fault::new("config", "the descriptor has no message Params"))?;
                Some(params)
            }
        };
        Ok(Self {
            name: source.key.full_name(),
            source: source.clone(),
            namespace: Arc::clone(&source.key.namespace),
            description: raw.description.unwrap_or_default(),
            templates: raw.templates,
            session_based: raw.session_based,
            params,
        })
    }
}

/// The descriptors in a base64 text of a FileDescriptorSet.
fn pool(text: &str) -> Result<DescriptorPool, String> {
    if text.len() > MAX_DESCRIPTOR_BYTES {
        return Err(format!(
            "the descriptor is longer than {MAX_DESCRIPTOR_BYTES} bytes"
        ));
    }
    let compact: String = text.chars().filter(|c| !c.is_ascii_whitespace()).collect();
    let bytes = base64::engine::general_purpose::STANDARD
        .decode(compact)
        .map_err(|error| format!("the descriptor is not base64: {error}"))?;
    // prost-reflect 0.16 panics on some sets that nobody's compiler makes.
    let decode = std::panic::AssertUnwindSafe(|| {
        DescriptorPool::decode(bytes.as_slice()).map_err(|error| error.to_string())
    });
    let pool = std::panic::catch_unwind(decode)
        .unwrap_or_else(|_| Err("it contradicts itself".to_owned()))
        .map_err(|reason| {
            format!("the descriptor is no google.protobuf.FileDescriptorSet: {reason}")
        })?;
    // Nobody else looks whether a map's entries are entries.
    for message in pool.all_messages().filter(MessageDescriptor::is_map_entry) {
        let is = |number: u32, name: &str| {
            let field = message.get_field(number);
            field.is_some_and(|field| field.name() == name && !field.is_list())
        };
        if !is(1, "key") || !is(2, "value") {
            return Err(format!("{} is no map entry", message.full_name()));
        }
    }
    Ok(pool)
}

/// The options of a file that make it a template.
#[derive(Debug, Default)]
struct Options {
    variety: Option<i64>,
    name: Option<String>,
}

/// The same options as a message of their own: the file that declares them
/// (`istio/mixer/adapter/model/v1beta1/extensions.proto`) need not be in the set.
#[derive(Clone, PartialEq, prost::Message)]
struct WireOptions {
    #[prost(int64, optional, tag = "72295727")]
    variety: Option<i64>,
    #[prost(string, optional, tag = "72295888")]
    name: Option<String>,
}

impl Options {
    fn is_template(&self) -> bool {
        self.name.is_some() || self.variety.is_some()
    }

    fn of(file: &FileDescriptor) -> Result<Self, String> {
        let bytes = file.options().encode_to_vec();
        let wire = WireOptions::decode(bytes.as_slice()).map_err(|error| error.to_string())?;
        Ok(Self {
            variety: wire.variety,
            name: wire.name.filter(|name| !name.is_empty()),
        })
    }
}

#[cfg(test)]
mod tests;
