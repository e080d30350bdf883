//! Instances of remote templates: expressions wherever the template's message has a value, type-checked at
//! load, and written as the message for each request.

use std::sync::Arc;

use lateen_adapter::ValueType;
use lateen_engine::{AttributeTable, Bag, Expression, Language, Slot, Tracker};
use prost_reflect::{FieldDescriptor, Kind, MessageDescriptor};
use serde_json::{Map, Value as Json};

pub use super::encode::EncodeError;
use super::{
    NAME_FIELD, RemoteTemplate,
    encode::{Form, Plan},
    output::Decoded,
};
use crate::config::{
    instance::{Binding, Raw, bindings},
    object::{Fault, Source},
};

/// A compiled instance.
#[derive(Debug)]
pub struct RemoteInstance {
    /// `NAME.KIND.NAMESPACE`.
    pub name: Arc<str>,
    /// The first part of it: how a request names a quota.
    pub short_name: Arc<str>,
    /// Its template.
    pub template: Arc<RemoteTemplate>,
    /// Path of each field that has an expression, and its type.
    pub types: Vec<(Arc<str>, ValueType)>,
    fields: Vec<Plan>,
    bindings: Vec<Binding>,
}

/// The parts of an instance's spec.
#[derive(Clone, Copy, Debug, Default)]
pub struct Written<'a> {
    /// Field to expression.
    pub params: Option<&'a Map<String, Json>>,
    /// Attribute to expression over the output.
    pub bindings: Option<&'a Map<String, Json>>,
}

impl RemoteInstance {
    /// Compiles `source`, of kind `instance` or a legacy kind, as an instance of `template`.
    ///
    /// # Errors
    /// As [`RemoteInstance::compile`].
    pub fn read(
        source: &Source,
        template: Arc<RemoteTemplate>,
        table: &AttributeTable,
    ) -> Result<Self, Vec<Fault>> {
        if lateen_adapter::template::find(&source.key.kind).is_none() {
            let written = Raw::shape(&source.spec).map_err(|fault| vec![fault])?;
            return Self::compile(source, template, written, table);
        }
        // All of a legacy kind's spec are parameters, but for these.
        let params = source.spec.as_object().map(|spec| {
            let others = spec.iter().filter(|(key, _)| !Raw::is_beside_params(key));
            others
                .map(|(key, json)| (key.clone(), json.clone()))
                .collect()
        });
        let written = Written {
            params: params.as_ref(),
            bindings: None,
        };
        Self::compile(source, template, written, table)
    }

    /// Compiles what `source` says, which is an instance of `template`; answers with everything that is wrong.
    ///
    /// # Errors
    /// Unknown fields, expressions that do not compile or have the wrong type.
    pub fn compile(
        source: &Source,
        template: Arc<RemoteTemplate>,
        written: Written<'_>,
        table: &AttributeTable,
    ) -> Result<Self, Vec<Fault>> {
        let name = source.key.full_name();
        let mut compiler = Compiler {
            language: source.language().map_err(|fault| vec![fault])?,
            table,
            faults: Vec::new(),
            types: Vec::new(),
        };
        let mut fields = match written.params {
            Some(params) => compiler.message(&template.instance, params, "params", ""),
            None => Vec::new(),
        };
        if template.instance.get_field(NAME_FIELD).is_some() {
            fields.push(Plan::constant_text(NAME_FIELD, &name));
        }
        let generated = template.generated_outputs();
        let bindings = bindings(
            table,
            generated,
            &template.template_name,
            written.bindings,
            &mut compiler.faults,
        );
        compiler.types.sort();
        if compiler.faults.is_empty() {
            Ok(Self {
                name,
                short_name: Arc::clone(&source.key.name),
                template,
                types: compiler.types,
                fields,
                bindings,
            })
        } else {
            Err(compiler.faults)
        }
    }

    /// The template's message for a request, in protobuf's binary form.
    ///
    /// # Errors
    /// An expression has no value, or one that does not fit.
    pub fn encode(&self, bag: &Bag, tracker: &mut Tracker) -> Result<Vec<u8>, EncodeError> {
        let mut buffer = Vec::with_capacity(256);
        for field in &self.fields {
            field.write(bag, tracker, &mut buffer)?;
        }
        Ok(buffer)
    }

    /// Puts what a generator found into the generated layer. A binding without a value leaves its attribute
    /// as it was.
    pub fn bind(&self, output: Decoded, bag: &mut Bag) {
        if let Some(table) = self.template.generated_outputs() {
            Binding::apply(&self.bindings, table, output, bag);
        }
    }

    /// The attributes this instance may generate.
    pub fn writes(&self) -> Vec<Slot> {
        self.bindings.iter().map(|binding| binding.slot).collect()
    }

    /// The attributes this instance generates, whatever the generator finds.
    pub fn generated(&self) -> Vec<Slot> {
        self.template
            .generated_outputs()
            .map_or_else(Vec::new, |table| Binding::always(&self.bindings, table))
    }
}

struct Compiler<'a> {
    language: Language,
    table: &'a AttributeTable,
    faults: Vec<Fault>,
    types: Vec<(Arc<str>, ValueType)>,
}

impl Compiler<'_> {
    fn fault<T>(&mut self, at: &str, reason: impl std::fmt::Display) -> Option<T> {
        self.faults.push(Fault::new(at, reason));
        None
    }

    /// `at` is where the fields are written, `path` what they are called in `types`.
    fn message(
        &mut self,
        descriptor: &MessageDescriptor,
        written: &Map<String, Json>,
        at: &str,
        path: &str,
    ) -> Vec<Plan> {
        let mut plans = Vec::new();
        let mut seen: Vec<FieldDescriptor> = Vec::new();
        for (key, json) in written {
            let at = format!("{at}.{key}");
            let found = descriptor
                .get_field_by_name(key)
                .or_else(|| descriptor.get_field_by_json_name(key))
                .filter(|field| field.number() != NAME_FIELD);
            let Some(field) = found else {
                let known: Vec<String> = descriptor
                    .fields()
                    .filter(|field| field.number() != NAME_FIELD)
                    .map(|field| field.name().to_owned())
                    .collect();
                let known = match known.as_slice() {
                    [] => "it has none".to_owned(),
                    names => format!("it has {}", names.join(", ")),
                };
                self.fault::<()>(&at, format!("the template has no such field; {known}"));
                continue;
            };
            if seen.contains(&field) {
                self.fault::<()>(&at, "the field is there twice");
                continue;
            }
            if json.is_null() || json.as_str() == Some("") {
                continue;
            }
            let path = join(path, field.name());
            seen.push(field.clone());
            self.field(&field, json, &at, &path, &mut plans);
        }
        plans
    }

    fn field(
        &mut self,
        field: &FieldDescriptor,
        json: &Json,
        at: &str,
        path: &str,
        plans: &mut Vec<Plan>,
    ) {
        if field.is_map() {
            self.map(field, json, at, path, plans);
        } else if field.is_list() {
            let Some(items) = json.as_array() else {
                self.fault::<()>(at, format!("{json} is no list"));
                return;
            };
            for (i, item) in items.iter().enumerate() {
                plans.extend(self.single(field, item, &format!("{at}[{i}]"), path));
            }
        } else {
            plans.extend(self.single(field, json, at, path));
        }
    }

    fn map(
        &mut self,
        field: &FieldDescriptor,
        json: &Json,
        at: &str,
        path: &str,
        plans: &mut Vec<Plan>,
    ) {
        let Kind::Message(entry) = field.kind() else {
            self.fault::<()>(at, "the template has a map without entries");
            return;
        };
        let key_kind = entry.map_entry_key_field().kind();
        let value_field = entry.map_entry_value_field();
        match json {
            Json::Object(entries) => {
                for (key, json) in entries {
                    let at = format!("{at}.{key}");
                    let Some(written) = Plan::map_key(&key_kind, key) else {
                        self.fault::<()>(&at, format!("{key} is no key of type {key_kind:?}"));
                        continue;
                    };
                    let path = join(path, key);
                    if let Some(value) = self.single(&value_field, json, &at, &path) {
                        plans.push(Plan::Message {
                            number: field.number(),
                            fields: vec![written, value],
                        });
                    }
                }
            }
            // A map of texts may come from one expression.
            _ if key_kind == Kind::String && value_field.kind() == Kind::String => {
                let expression = self.expression(json, Some(ValueType::StringMap), at, path);
                plans.extend(expression.map(|e| Plan::value(field, Form::StringMap, e)));
            }
            other => {
                self.fault::<()>(at, format!("{other} is no map"));
            }
        }
    }

    fn single(
        &mut self,
        field: &FieldDescriptor,
        json: &Json,
        at: &str,
        path: &str,
    ) -> Option<Plan> {
        let kind = field.kind();
        if let Some(form) = Form::of(&kind) {
            let expression = self.expression(json, form.value_type(), at, path)?;
            return Some(Plan::value(field, form, expression));
        }
        match (&kind, json) {
            (Kind::Enum(values), json) => {
                let number = match json {
                    Json::String(name) => values.get_value_by_name(name).map(|v| v.number()),
                    json => json.as_i64().and_then(|n| i32::try_from(n).ok()),
                };
                match number {
                    Some(number) => Some(Plan::constant_enum(field.number(), number)),
                    None => {
                        let names: Vec<String> =
                            values.values().map(|v| v.name().to_owned()).collect();
                        self.fault(at, format!("{json} is none of {}", names.join(", ")))
                    }
                }
            }
            (Kind::Message(message), Json::Object(written)) => {
                let fields = self.message(message, written, at, path);
                Some(Plan::Message {
                    number: field.number(),
                    fields,
                })
            }
            (Kind::Message(_), other) => self.fault(at, format!("{other} is no map")),
            _ => self.fault(at, "no expression has such values (bytes)"),
        }
    }

    fn expression(
        &mut self,
        json: &Json,
        want: Option<ValueType>,
        at: &str,
        path: &str,
    ) -> Option<Expression> {
        let expression = match Expression::compile_param(self.language, json, self.table) {
            Ok(expression) => expression,
            Err(error) => return self.fault(at, error),
        };
        let ty = expression.value_type();
        let faults: Vec<Fault> = expression
            .faults()
            .iter()
            .map(|f| Fault::new(at, f))
            .collect();
        self.faults.extend(faults);
        if let Some(want) = want.filter(|want| *want != ty) {
            let reason = format!("'{}' is {ty}, but the field is {want}", expression.text());
            return self.fault(at, reason);
        }
        self.types.push((Arc::from(path), ty));
        Some(expression)
    }
}

fn join(path: &str, key: &str) -> String {
    match path {
        "" => key.to_owned(),
        path => format!("{path}.{key}"),
    }
}
