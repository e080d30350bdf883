//! Interfaces as text.

use std::fmt::Write as _;

use super::{Interface, PACKAGE, Shape, VERSION, shared};

/// WIT's own words, which need a `%` as names (the component model's grammar of WIT).
const KEYWORDS: [&str; 44] = [
    "as",
    "async",
    "bool",
    "borrow",
    "char",
    "constructor",
    "enum",
    "error-context",
    "export",
    "f32",
    "f64",
    "flags",
    "from",
    "func",
    "future",
    "import",
    "include",
    "interface",
    "list",
    "map",
    "option",
    "own",
    "package",
    "record",
    "resource",
    "result",
    "s16",
    "s32",
    "s64",
    "s8",
    "static",
    "stream",
    "string",
    "tuple",
    "type",
    "u16",
    "u32",
    "u64",
    "u8",
    "use",
    "variant",
    "with",
    "world",
    "union",
];

/// The whole package, with a world `adapter` that exports `handler` and the interfaces in `templates`.
pub fn package(templates: &[Interface]) -> String {
    let mut text = format!("package {PACKAGE}@{VERSION};\n\n");
    text.push_str("/// Values and verdicts.\ninterface types {\n");
    for (shape, doc) in shared::types() {
        documented(&mut text, "  ", doc);
        define(&mut text, &shape);
    }
    text.push_str("}\n");
    for one in [&shared::host(), &shared::handler()]
        .into_iter()
        .chain(templates)
    {
        text.push('\n');
        interface(&mut text, one);
    }
    text.push_str(
        "\n/// An adapter that takes these templates. Delete what yours does not take.\nworld adapter {\n",
    );
    text.push_str("  import host;\n  export handler;\n");
    for one in templates {
        writeln!(text, "  export {};", name(&one.name)).expect("a String takes everything");
    }
    text.push_str("}\n");
    text
}

fn interface(text: &mut String, interface: &Interface) {
    let mut named = Vec::new();
    for function in &interface.functions {
        let shapes = function.params.iter().map(|(_, shape)| shape);
        shapes
            .chain(&function.result)
            .for_each(|shape| collect(shape, &mut named));
    }
    let common: Vec<String> = shared::types()
        .iter()
        .filter_map(|(shape, _)| shape.name().map(str::to_owned))
        .collect();
    let (used, own): (Vec<_>, Vec<_>) = named
        .into_iter()
        .partition(|shape| shape.name().is_some_and(|n| common.iter().any(|c| c == n)));
    documented(text, "", &interface.doc);
    writeln!(text, "interface {} {{", name(&interface.name)).expect("a String takes everything");
    // What only stands inside of others is not said in this interface.
    let mut direct = Vec::new();
    for function in &interface.functions {
        let shapes = function.params.iter().map(|(_, shape)| shape);
        shapes
            .chain(&function.result)
            .for_each(|shape| mentioned(shape, &mut direct));
    }
    for shape in &own {
        parts(shape)
            .into_iter()
            .for_each(|part| mentioned(part, &mut direct));
    }
    let mut names: Vec<String> = used
        .iter()
        .filter_map(|shape| shape.name())
        .filter(|n| direct.contains(n))
        .map(name)
        .collect();
    names.sort();
    if !names.is_empty() {
        writeln!(text, "  use types.{{{}}};", names.join(", ")).expect("a String takes everything");
    }
    own.into_iter().for_each(|shape| define(text, shape));
    for function in &interface.functions {
        documented(text, "  ", function.doc);
        let params: Vec<String> = function
            .params
            .iter()
            .map(|(label, shape)| format!("{}: {}", name(label), inline(shape)))
            .collect();
        let result = function.result.as_ref().map(inline);
        let arrow = result.map(|r| format!(" -> {r}")).unwrap_or_default();
        writeln!(
            text,
            "  {}: func({}){arrow};",
            name(function.name),
            params.join(", ")
        )
        .expect("a String takes everything");
    }
    text.push_str("}\n");
}

fn documented(text: &mut String, indent: &str, doc: &str) {
    if !doc.is_empty() {
        writeln!(text, "{indent}/// {doc}").expect("a String takes everything");
    }
}

/// The definition of a type that has a name.
fn define(text: &mut String, shape: &Shape) {
    let (keyword, title, lines): (_, _, Vec<String>) = match shape {
        Shape::Record(record) => {
            let lines = record.fields.iter();
            let lines = lines.map(|(label, shape)| format!("{}: {}", name(label), inline(shape)));
            ("record", &record.name, lines.collect())
        }
        Shape::Variant(variant) => {
            let lines = variant.cases.iter().map(|(label, shape)| match shape {
                Some(shape) => format!("{}({})", name(label), inline(shape)),
                None => name(label),
            });
            ("variant", &variant.name, lines.collect())
        }
        Shape::Enum(one) => {
            let lines = one.cases.iter().map(|label| name(label));
            ("enum", &one.name, lines.collect())
        }
        _ => return,
    };
    writeln!(text, "  {keyword} {} {{", name(title)).expect("a String takes everything");
    for line in lines {
        writeln!(text, "    {line},").expect("a String takes everything");
    }
    text.push_str("  }\n");
}

/// A type where it is used.
fn inline(shape: &Shape) -> String {
    let part = |shape: &Option<Box<Shape>>| shape.as_deref().map(inline);
    match shape {
        Shape::Bool => "bool".to_owned(),
        Shape::U8 => "u8".to_owned(),
        Shape::U32 => "u32".to_owned(),
        Shape::U64 => "u64".to_owned(),
        Shape::S32 => "s32".to_owned(),
        Shape::S64 => "s64".to_owned(),
        Shape::F64 => "f64".to_owned(),
        Shape::String => "string".to_owned(),
        Shape::List(of) => format!("list<{}>", inline(of)),
        Shape::Option(of) => format!("option<{}>", inline(of)),
        Shape::Tuple(of) => {
            let parts: Vec<_> = of.iter().map(inline).collect();
            format!("tuple<{}>", parts.join(", "))
        }
        Shape::Result(ok, error) => match (part(ok), part(error)) {
            (None, None) => "result".to_owned(),
            (Some(ok), None) => format!("result<{ok}>"),
            (ok, Some(error)) => format!("result<{}, {error}>", ok.as_deref().unwrap_or("_")),
        },
        Shape::Record(_) | Shape::Variant(_) | Shape::Enum(_) => {
            name(shape.name().unwrap_or_default())
        }
    }
}

fn name(text: &str) -> String {
    if KEYWORDS.contains(&text) {
        format!("%{text}")
    } else {
        text.to_owned()
    }
}

/// What a type is made of.
fn parts(shape: &Shape) -> Vec<&Shape> {
    match shape {
        Shape::List(of) | Shape::Option(of) => vec![of],
        Shape::Tuple(of) => of.iter().collect(),
        Shape::Result(ok, error) => ok.as_deref().into_iter().chain(error.as_deref()).collect(),
        Shape::Record(record) => record.fields.iter().map(|(_, shape)| shape).collect(),
        Shape::Variant(variant) => variant.cases.iter().flat_map(|(_, s)| s).collect(),
        _ => Vec::new(),
    }
}

/// All types with names in `shape`, those inside before those around them.
fn collect<'a>(shape: &'a Shape, found: &mut Vec<&'a Shape>) {
    for part in parts(shape) {
        collect(part, found);
    }
    if shape.name().is_some() && !found.contains(&shape) {
        found.push(shape);
    }
}

/// The names that stand in the text of `shape`.
fn mentioned<'a>(shape: &'a Shape, found: &mut Vec<&'a str>) {
    match shape.name() {
        Some(name) => found.push(name),
        None => parts(shape)
            .into_iter()
            .for_each(|part| mentioned(part, found)),
    }
}
