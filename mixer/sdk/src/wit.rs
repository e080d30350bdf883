//! Templates as WebAssembly interfaces: the WIT package `lateen:adapter` that an adapter written as a component
//! exports, made of the templates ([`interface`]) and of what all of them share ([`shared`]).
//!
//! A template is an interface of its name with a record `instance` of its fields and one function `handle`.
//! Fields keep their names, in kebab case. Text, numbers and booleans that an instance lacks are empty, 0 and
//! false; what has no such value is an `option`.

mod print;
pub mod shared;

use lateen_engine::ValueType;

pub use print::package;

use crate::template::{Field, FieldKind, Template, Variety};

/// The package's name.
pub const PACKAGE: &str = "lateen:adapter";
/// Its version. Guests of another version are refused.
pub const VERSION: &str = "0.1.0";

/// The name under which interface `name` is exported and imported: `lateen:adapter/NAME@VERSION`.
pub fn qualified(name: &str) -> String {
    format!("{PACKAGE}/{name}@{VERSION}")
}

/// A type of the component model.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "WIT's names")]
pub enum Shape {
    Bool,
    U8,
    U32,
    U64,
    S32,
    S64,
    F64,
    String,
    List(Box<Shape>),
    Tuple(Vec<Shape>),
    Option(Box<Shape>),
    Result(Option<Box<Shape>>, Option<Box<Shape>>),
    Record(Record),
    Variant(Variant),
    Enum(Enum),
}

impl Shape {
    /// Its name, if it has one.
    pub fn name(&self) -> Option<&str> {
        match self {
            Self::Record(record) => Some(&record.name),
            Self::Variant(variant) => Some(&variant.name),
            Self::Enum(one) => Some(&one.name),
            _ => None,
        }
    }
}

/// A record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Its name.
    pub name: String,
    /// Its fields.
    pub fields: Vec<(String, Shape)>,
}

/// A variant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Variant {
    /// Its name.
    pub name: String,
    /// Its cases and what each carries.
    pub cases: Vec<(String, Option<Shape>)>,
}

/// An enum.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Enum {
    /// Its name.
    pub name: String,
    /// Its cases.
    pub cases: Vec<String>,
}

/// A function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Function {
    /// Its name.
    pub name: &'static str,
    /// For the author.
    pub doc: &'static str,
    /// Its parameters.
    pub params: Vec<(&'static str, Shape)>,
    /// What it returns.
    pub result: Option<Shape>,
}

/// An interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// For the author.
    pub doc: String,
    /// Its functions.
    pub functions: Vec<Function>,
}

/// Two fields of a template are the same name in kebab case, or one is no name there.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} cannot be a name in WIT beside the others of its template")]
pub struct BadName(String);

/// The interface that a component exports to take instances of `template`.
///
/// # Errors
/// When the template's names do not make names of an interface.
pub fn interface(template: &Template) -> Result<Interface, BadName> {
    let instance = record("instance", template.fields)?;
    let failed = Some(Box::new(Shape::String));
    let ok = |shape: Option<Shape>| Some(Shape::Result(shape.map(Box::new), failed.clone()));
    let (doc, params, result) = match template.variety {
        Variety::Check => (
            "The verdict on one instance. An error is settled by the rule's fail mode.",
            vec![("instance", instance)],
            ok(Some(shared::check_result())),
        ),
        Variety::CheckWithOutput => (
            "The verdict on one instance, and what was found out. An error is settled by the rule's fail mode.",
            vec![("instance", instance)],
            ok(Some(Shape::Tuple(vec![
                shared::check_result(),
                output(template)?,
            ]))),
        ),
        Variety::Report => (
            "Takes the instances of one report.",
            vec![("instances", Shape::List(Box::new(instance)))],
            ok(None),
        ),
        Variety::Quota => (
            "Takes an amount from the counter that the instance names.",
            vec![("instance", instance), ("args", shared::quota_args())],
            ok(Some(shared::quota_result())),
        ),
        Variety::AttributeGenerator => (
            "What is known about the instance; what is unknown is none.",
            vec![("instance", instance)],
            ok(Some(output(template)?)),
        ),
    };
    Ok(Interface {
        name: kebab(template.name)?,
        doc: format!("Template {}.", template.name),
        functions: vec![Function {
            name: "handle",
            doc,
            params,
            result,
        }],
    })
}

/// The record of `fields`; the instance itself also has its full name.
fn record(name: &str, fields: &[Field]) -> Result<Shape, BadName> {
    let mut shapes = Vec::with_capacity(fields.len() + 1);
    if name == "instance" {
        shapes.push(("name".to_owned(), Shape::String));
    }
    for field in fields {
        let label = kebab(field.name)?;
        let shape = match &field.kind {
            FieldKind::Exact(ty) => exact(*ty),
            FieldKind::Any => Shape::Option(Box::new(shared::value())),
            FieldKind::Map => {
                Shape::List(Box::new(Shape::Tuple(vec![Shape::String, shared::value()])))
            }
            FieldKind::Message(fields) => record(&nested(name, &label), fields)?,
        };
        if shapes.iter().any(|(taken, _)| *taken == label) {
            return Err(BadName(field.name.to_owned()));
        }
        shapes.push((label, shape));
    }
    // A record of the component model is not empty, and an instance has a name.
    if shapes.is_empty() {
        shapes.push(("empty".to_owned(), Shape::Bool));
    }
    Ok(Shape::Record(Record {
        name: name.to_owned(),
        fields: shapes,
    }))
}

/// The name of the record that field `label` of record `outer` is.
fn nested(outer: &str, label: &str) -> String {
    let is_taken = ["instance", "output"].contains(&label)
        || shared::types()
            .iter()
            .any(|(shape, _)| shape.name() == Some(label));
    match outer {
        "instance" if !is_taken => label.to_owned(),
        "instance" => format!("{label}-message"),
        outer => format!("{outer}-{label}"),
    }
}

/// A field of one type: what has a natural nothing is that when the instance lacks it.
fn exact(ty: ValueType) -> Shape {
    match ty {
        ValueType::String
        | ValueType::Int64
        | ValueType::Double
        | ValueType::Bool
        | ValueType::StringMap => shared::payload(ty),
        ValueType::Timestamp
        | ValueType::IpAddress
        | ValueType::EmailAddress
        | ValueType::Uri
        | ValueType::DnsName
        | ValueType::Duration => Shape::Option(Box::new(shared::payload(ty))),
    }
}

fn output(template: &Template) -> Result<Shape, BadName> {
    let mut fields: Vec<(String, Shape)> = Vec::with_capacity(template.outputs.len());
    for (name, ty) in template.outputs {
        let label = kebab(name)?;
        if fields.iter().any(|(taken, _)| *taken == label) {
            return Err(BadName((*name).to_owned()));
        }
        fields.push((label, Shape::Option(Box::new(shared::payload(*ty)))));
    }
    if fields.is_empty() {
        fields.push(("empty".to_owned(), Shape::Bool));
    }
    Ok(Shape::Record(Record {
        name: "output".to_owned(),
        fields,
    }))
}

/// A name in kebab case: `source_uid` and `sourceUid` are `source-uid`. A word that begins with a digit is joined to
/// the one before, as WIT has no such words.
///
/// # Errors
/// When nothing is left that begins with a letter, or a character is neither letter, digit, `_`, `-` nor `.`.
pub fn kebab(name: &str) -> Result<String, BadName> {
    let bad = || BadName(name.to_owned());
    let mut out = String::with_capacity(name.len() + 4);
    let mut ends_word = false;
    let mut before = ' ';
    for c in name.chars() {
        match c {
            '_' | '-' | '.' => ends_word = !out.is_empty(),
            c if c.is_ascii_alphanumeric() => {
                let is_hump = c.is_ascii_uppercase() && before.is_ascii_lowercase();
                if (ends_word || is_hump) && c.is_ascii_alphabetic() {
                    out.push('-');
                }
                out.push(c.to_ascii_lowercase());
                ends_word = false;
            }
            _ => return Err(bad()),
        }
        before = c;
    }
    if out.starts_with(|c: char| c.is_ascii_lowercase()) {
        Ok(out)
    } else {
        Err(bad())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::template;

    #[test]
    fn names_are_in_kebab_case() {
        for (name, want) in [
            ("source_uid", "source-uid"),
            ("sourceUid", "source-uid"),
            ("HTTPCode", "httpcode"),
            ("http_2_code", "http2-code"),
            ("my.template", "my-template"),
            ("_x", "x"),
        ] {
            assert_eq!(kebab(name).as_deref(), Ok(want), "{name}");
        }
        for bad in ["", "_", "1x", "a b", "ä"] {
            assert!(kebab(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn every_template_is_an_interface() {
        for template in template::ALL {
            let interface = interface(template).unwrap();
            assert_eq!(interface.name, template.name);
            let [handle] = interface.functions.as_slice() else {
                panic!("{}: one function", template.name);
            };
            assert!(matches!(handle.result, Some(Shape::Result(..))));
        }
    }
}
