//! Attributes as people give them: in YAML or JSON files, or `NAME=VALUE` on the command line.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use lateen_engine::{AttributeTable, Bag, StringMap, Value, ValueType};
use serde_json::{Map, Value as Json};

/// Which attributes there are, and which a request has.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Attributes {
    /// Declared attributes besides the usual ones: an attributemanifest, or `NAME: TYPE` lines, in YAML or JSON.
    #[arg(long, value_name = "FILE")]
    pub manifest: Option<PathBuf>,
    /// Attributes of the request, `NAME: VALUE` in YAML or JSON.
    #[arg(long, value_name = "FILE")]
    pub attributes: Option<PathBuf>,
    /// One attribute; a key of a string map is NAME[KEY]=VALUE.
    #[arg(short = 'a', long = "attribute", value_name = "NAME=VALUE")]
    pub attribute: Vec<String>,
}

impl Attributes {
    /// The attributes there are.
    ///
    /// # Errors
    /// A file that cannot be read, or declares nothing that makes sense.
    pub fn table(&self) -> anyhow::Result<AttributeTable> {
        let Some(path) = &self.manifest else {
            return Ok(AttributeTable::default_vocabulary());
        };
        let types = types(&read(path)?).with_context(|| path.display().to_string())?;
        let usual = AttributeTable::default_vocabulary();
        let usual: Vec<(String, ValueType)> =
            usual.iter().map(|(n, t)| (n.to_owned(), t)).collect();
        AttributeTable::new(usual.into_iter().chain(types))
            .with_context(|| path.display().to_string())
    }

    /// The request.
    ///
    /// # Errors
    /// An attribute that is not declared, or not of its type.
    pub fn bag(&self, table: &AttributeTable) -> anyhow::Result<Bag> {
        let mut bag = Bag::new(table);
        if let Some(path) = &self.attributes {
            let json = read(path)?;
            let place = || path.display().to_string();
            let object = json
                .as_object()
                .context("it is no map")
                .with_context(place)?;
            fill(&mut bag, object).with_context(place)?;
        }
        for text in &self.attribute {
            set(&mut bag, text).with_context(|| format!("--attribute {text}"))?;
        }
        Ok(bag)
    }
}

/// Reads YAML, of which JSON is a part.
///
/// # Errors
/// There is no such file, or it is something else.
pub fn read(path: &Path) -> anyhow::Result<Json> {
    let text =
        std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_saphyr::from_str(&text).with_context(|| path.display().to_string())
}

/// The declarations of a manifest: an object of kind attributemanifest, its spec, or names and types.
///
/// # Errors
/// Something that is no type.
pub fn types(json: &Json) -> anyhow::Result<BTreeMap<String, ValueType>> {
    let spec = if json["spec"].is_object() {
        &json["spec"]
    } else {
        json
    };
    let declared = if spec["attributes"].is_object() {
        &spec["attributes"]
    } else {
        spec
    };
    let declared = declared.as_object().context("it is no map")?;
    declared
        .iter()
        .map(|(name, declared)| {
            let ty = declared.as_str().or_else(|| declared["valueType"].as_str());
            let ty = ty.with_context(|| format!("{name} has no type"))?;
            let ty: ValueType = ty.parse().with_context(|| name.clone())?;
            Ok((name.clone(), ty))
        })
        .collect()
}

/// Sets attributes by name. Values are plain, or `{type, value}` to have another type than the declared one.
///
/// # Errors
/// An attribute that is not declared, or not of its type.
pub fn fill(bag: &mut Bag, object: &Map<String, Json>) -> anyhow::Result<()> {
    for (name, json) in object {
        let declared = bag.table().value_type(name).with_context(|| {
            format!("no manifest declares {name}; do so with an attributemanifest")
        })?;
        let value = match (json["type"].as_str(), json.get("value")) {
            (Some(ty), Some(value)) if declared != ValueType::StringMap => {
                Value::from_json(ty.parse().with_context(|| name.clone())?, value)
            }
            _ => Value::from_json(declared, json),
        };
        bag.set_by_name(name, value.with_context(|| name.clone())?)?;
    }
    Ok(())
}

fn set(bag: &mut Bag, text: &str) -> anyhow::Result<()> {
    let (name, value) = text.split_once('=').context("it is no NAME=VALUE")?;
    let (name, key) = match name.strip_suffix(']').and_then(|n| n.split_once('[')) {
        Some((name, key)) => (name, Some(key)),
        None => (name, None),
    };
    let slot = bag
        .table()
        .slot(name)
        .with_context(|| format!("no manifest declares {name}"))?;
    let ty = bag.table().type_of(slot);
    let value = match key {
        Some(key) => {
            anyhow::ensure!(
                ty == ValueType::StringMap,
                "{name} is {ty}, and has no keys"
            );
            let old = bag
                .get(slot)
                .and_then(Value::as_map)
                .cloned()
                .unwrap_or_default();
            let old = old.iter().map(|(k, v)| (k.clone(), v.clone()));
            Value::StringMap(StringMap::new(old.chain([(key.into(), value.into())])))
        }
        // Text that is no JSON by itself is text; `5` and `true` are what the type asks for.
        None => match serde_json::from_str::<Json>(value) {
            Ok(json) if !json.is_string() && !is_textual(ty) => Value::from_json(ty, &json)?,
            _ => Value::from_json(ty, &Json::String(value.to_owned()))?,
        },
    };
    bag.set(slot, value);
    Ok(())
}

fn is_textual(ty: ValueType) -> bool {
    !matches!(
        ty,
        ValueType::Bool | ValueType::Int64 | ValueType::Double | ValueType::StringMap
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_sets_values_of_every_type() {
        let table = AttributeTable::default_vocabulary();
        let given = Attributes {
            attribute: [
                "source.name=true",
                "response.code=503",
                "connection.mtls=true",
                "source.ip=10.0.0.1",
                "response.duration=1.5s",
                "request.headers[x-user]=jason",
                "request.headers[a]=1=2",
            ]
            .map(str::to_owned)
            .to_vec(),
            ..Attributes::default()
        };
        let bag = given.bag(&table).unwrap();
        let shown: Vec<String> = bag.iter().map(|(n, v)| format!("{n}={v}")).collect();
        assert_eq!(
            shown,
            [
                "connection.mtls=true",
                "request.headers={a: 1=2, x-user: jason}",
                "response.code=503",
                "response.duration=1.5s",
                "source.ip=10.0.0.1",
                "source.name=true",
            ]
        );
    }

    #[test]
    fn what_is_not_declared_is_refused() {
        let table = AttributeTable::default_vocabulary();
        for (text, reason) in [
            ("x.y=1", "no manifest declares x.y"),
            ("source.name", "it is no NAME=VALUE"),
            ("source.name[x]=1", "source.name is STRING, and has no keys"),
            ("response.code=x", "\"x\" is no INT64"),
        ] {
            let given = Attributes {
                attribute: vec![text.to_owned()],
                ..Attributes::default()
            };
            let error = format!("{:#}", given.bag(&table).unwrap_err());
            assert!(error.contains(reason), "{error}");
        }
    }

    #[test]
    fn manifests_have_three_shapes() {
        for json in [
            serde_json::json!({"spec": {"attributes": {"a": {"valueType": "BOOL"}}}}),
            serde_json::json!({"attributes": {"a": {"valueType": "BOOL"}}}),
            serde_json::json!({"a": "BOOL"}),
        ] {
            let want = [("a".to_owned(), ValueType::Bool)].into();
            assert_eq!(types(&json).unwrap(), want);
        }
    }
}
