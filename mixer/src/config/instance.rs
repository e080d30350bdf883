//! Instances compiled: a template's fields, each an expression, and for generators the attributes that
//! their results are bound to.

use std::{
    collections::HashMap,
    sync::{Arc, LazyLock},
};

use lateen_adapter::{
    Field, FieldKind, InstanceType, Output, Template, Value, ValueType, Variety,
    instance::{FieldValue, Fields},
    template,
};
use lateen_engine::{AttributeTable, Bag, EvalError, Expression, Language, Slot, Tracker};
use serde_json::{Map, Value as Json};

use super::{
    object::{Fault, Source},
    remote::instance::Written,
};

/// A compiled instance.
#[derive(Debug)]
pub struct Instance {
    /// `NAME.KIND.NAMESPACE`.
    pub name: Arc<str>,
    /// The first part of it: how a request names a quota.
    pub short_name: Arc<str>,
    /// Its template.
    pub template: &'static Template,
    /// The types of its expressions.
    pub types: InstanceType,
    fields: Vec<(&'static str, Plan)>,
    bindings: Vec<Binding>,
}

#[derive(Debug)]
enum Plan {
    One(Expression),
    Map(Vec<(Arc<str>, Expression)>),
    Message(Vec<(&'static str, Plan)>),
}

/// An attribute, and what a generator's result makes of it.
#[derive(Debug)]
pub(super) struct Binding {
    pub(super) slot: Slot,
    expression: Expression,
}

impl Binding {
    /// Puts what was found into the generated layer. `table` has the results as attributes `output.NAME`.
    pub(super) fn apply<N: AsRef<str>>(
        bindings: &[Self],
        table: &AttributeTable,
        output: impl IntoIterator<Item = (N, Value)>,
        bag: &mut Bag,
    ) {
        const PREFIX: &str = "output.";
        let mut found = Bag::new(table);
        let mut full = String::with_capacity(64);
        full.push_str(PREFIX);
        for (name, value) in output {
            full.truncate(PREFIX.len());
            full.push_str(name.as_ref());
            // A name that the template lacks is an adapter's mistake that nobody can read.
            if let Some(slot) = table.slot(&full) {
                found.set(slot, value);
            }
        }
        for binding in bindings {
            if let Ok(value) = binding.expression.evaluate(&found, &mut Tracker::off()) {
                bag.generate(binding.slot, value);
            }
        }
    }

    /// The attributes that have a value whatever is found.
    pub(super) fn always(bindings: &[Self], table: &AttributeTable) -> Vec<Slot> {
        let nothing = Bag::new(table);
        let has_value = |binding: &&Self| {
            binding
                .expression
                .evaluate(&nothing, &mut Tracker::off())
                .is_ok()
        };
        let always = bindings.iter().filter(has_value);
        always.map(|binding| binding.slot).collect()
    }
}

/// For each generator template, its results as attributes `output.NAME`.
static OUTPUTS: LazyLock<HashMap<&'static str, AttributeTable>> = LazyLock::new(|| {
    let generators = template::ALL
        .iter()
        .filter(|t| t.variety == Variety::AttributeGenerator);
    generators
        .map(|t| {
            let names = t
                .outputs
                .iter()
                .map(|(name, ty)| (format!("output.{name}"), *ty));
            (
                t.name,
                AttributeTable::new(names).expect("outputs are named like attributes"),
            )
        })
        .collect()
});

/// The parts of an instance's spec.
#[derive(Debug)]
pub struct Raw<'a> {
    /// The template it names.
    pub template: &'static Template,
    /// Field to expression.
    pub params: Option<&'a Map<String, Json>>,
    /// Attribute to expression over the output.
    pub bindings: Option<&'a Map<String, Json>>,
    /// Path of the parameters within the spec: `params`, or nothing for a legacy kind.
    pub prefix: &'static str,
}

const BINDINGS: [&str; 2] = ["attributeBindings", "attribute_bindings"];

impl<'a> Raw<'a> {
    /// Takes the spec of kind `kind` apart.
    ///
    /// # Errors
    /// When it has another shape, or names no template.
    pub fn new(kind: &str, spec: &'a Json) -> Result<Self, Fault> {
        let bindings = BINDINGS.iter().find_map(|key| spec.get(key));
        let bindings = object("attributeBindings", bindings)?;
        if let Some(template) = template::find(kind) {
            let params = object("", Some(spec))?;
            return Ok(Self {
                template,
                params,
                bindings,
                prefix: "",
            });
        }
        Self::shape(spec)?;
        let named = ["compiledTemplate", "compiled_template", "template"]
            .into_iter()
            .find_map(|key| Some((key, spec.get(key)?)));
        let (field, name) = named
            .ok_or_else(|| Fault::new("compiledTemplate", "the instance names no template"))?;
        let template = name.as_str().and_then(template::find).ok_or_else(|| {
            let known: Vec<_> = template::ALL.iter().map(|t| t.name).collect();
            Fault::new(
                field,
                format!("unknown template {name}; there are {}", known.join(", ")),
            )
        })?;
        Ok(Self {
            template,
            params: object("params", spec.get("params"))?,
            bindings,
            prefix: "params",
        })
    }

    /// Whether a key of a legacy kind's spec is no parameter.
    pub fn is_beside_params(key: &str) -> bool {
        BINDINGS.contains(&key) || key == "name"
    }

    /// The parameters and bindings of an object of kind `instance`, whatever its template.
    ///
    /// # Errors
    /// It has fields that no instance has.
    pub fn shape(spec: &'a Json) -> Result<Written<'a>, Fault> {
        let known = [
            "name",
            "compiledTemplate",
            "compiled_template",
            "template",
            "params",
        ];
        for key in object("", Some(spec))?.into_iter().flat_map(Map::keys) {
            if !known.contains(&key.as_str()) && !BINDINGS.contains(&key.as_str()) {
                return Err(Fault::new(key, "there is no such field in an instance"));
            }
        }
        let bindings = BINDINGS.iter().find_map(|key| spec.get(key));
        Ok(Written {
            params: object("params", spec.get("params"))?,
            bindings: object("attributeBindings", bindings)?,
        })
    }
}

fn object<'a>(field: &str, json: Option<&'a Json>) -> Result<Option<&'a Map<String, Json>>, Fault> {
    match json {
        None | Some(Json::Null) => Ok(None),
        Some(Json::Object(map)) => Ok(Some(map)),
        Some(other) => Err(Fault::new(field, format!("{other} is no map"))),
    }
}

impl Instance {
    /// Compiles a spec; answers with everything that is wrong with it.
    ///
    /// # Errors
    /// Unknown fields, expressions that do not compile or have the wrong type.
    pub fn compile(source: &Source, table: &AttributeTable) -> Result<Self, Vec<Fault>> {
        let key = &source.key;
        let raw = Raw::new(&key.kind, &source.spec).map_err(|fault| vec![fault])?;
        let name = key.full_name();
        let mut compiler = Compiler {
            language: source.language().map_err(|fault| vec![fault])?,
            table,
            faults: Vec::new(),
            types: Vec::new(),
        };
        let fields = compiler.fields(
            raw.template.fields,
            raw.params,
            raw.prefix,
            "",
            raw.prefix.is_empty(),
        );
        let bindings = bindings(
            table,
            OUTPUTS.get(raw.template.name),
            raw.template.name,
            raw.bindings,
            &mut compiler.faults,
        );
        if !compiler.faults.is_empty() {
            return Err(compiler.faults);
        }
        compiler.types.sort();
        let types = InstanceType {
            name: Arc::clone(&name),
            template: raw.template.name,
            fields: compiler.types,
        };
        Ok(Self {
            name,
            short_name: Arc::clone(&key.name),
            template: raw.template,
            types,
            fields,
            bindings,
        })
    }

    /// Whether a request that asks for quota `name` means this instance: by its short or its full name.
    pub fn is_called(&self, name: &str) -> bool {
        self.short_name.eq_ignore_ascii_case(name) || self.name.eq_ignore_ascii_case(name)
    }

    /// Evaluates all fields.
    ///
    /// # Errors
    /// When one has no value for this request.
    pub fn evaluate(&self, bag: &Bag, tracker: &mut Tracker) -> Result<Fields, EvalError> {
        evaluate(&self.fields, bag, tracker)
    }

    /// Puts what a generator found into the generated layer. A binding without a value leaves its attribute
    /// as it was.
    pub fn bind(&self, output: Output, bag: &mut Bag) {
        if let Some(table) = OUTPUTS.get(self.template.name) {
            Binding::apply(&self.bindings, table, output, bag);
        }
    }

    /// The attributes this instance may generate.
    pub fn writes(&self) -> Vec<Slot> {
        self.bindings.iter().map(|binding| binding.slot).collect()
    }

    /// The attributes this instance generates, whatever the generator finds.
    pub fn generated(&self) -> Vec<Slot> {
        OUTPUTS
            .get(self.template.name)
            .map_or_else(Vec::new, |table| Binding::always(&self.bindings, table))
    }
}

fn evaluate(
    plans: &[(&'static str, Plan)],
    bag: &Bag,
    tracker: &mut Tracker,
) -> Result<Fields, EvalError> {
    let mut fields = Vec::with_capacity(plans.len());
    for (name, plan) in plans {
        let value = match plan {
            Plan::One(expression) => FieldValue::One(expression.evaluate(bag, tracker)?),
            Plan::Map(entries) => {
                let mut values = Vec::with_capacity(entries.len());
                for (key, expression) in entries {
                    values.push((Arc::clone(key), expression.evaluate(bag, tracker)?));
                }
                FieldValue::Map(values)
            }
            Plan::Message(plans) => FieldValue::Message(evaluate(plans, bag, tracker)?),
        };
        fields.push((*name, value));
    }
    Ok(Fields(fields))
}

struct Compiler<'a> {
    language: Language,
    table: &'a AttributeTable,
    faults: Vec<Fault>,
    types: Vec<(Arc<str>, ValueType)>,
}

impl Compiler<'_> {
    /// Compiles the fields of a template or message. `at` is where they are written, `path` what they are
    /// called in [`InstanceType`]; `beside_bindings`: the bindings stand among the fields.
    fn fields(
        &mut self,
        known: &'static [Field],
        written: Option<&Map<String, Json>>,
        at: &str,
        path: &str,
        beside_bindings: bool,
    ) -> Vec<(&'static str, Plan)> {
        let mut plans: Vec<(&'static str, Plan)> = Vec::new();
        for (key, json) in written.into_iter().flatten() {
            let at = join(at, key);
            if beside_bindings && Raw::is_beside_params(key) {
                continue;
            }
            let Some(field) = known.iter().find(|f| f.is_named(key)) else {
                let names: Vec<_> = known.iter().map(|f| f.name).collect();
                let known = match names.as_slice() {
                    [] => "it has none".to_owned(),
                    names => format!("it has {}", names.join(", ")),
                };
                self.faults.push(Fault::new(
                    at,
                    format!("the template has no such field; {known}"),
                ));
                continue;
            };
            if plans.iter().any(|(name, _)| *name == field.name) {
                self.faults.push(Fault::new(at, "the field is there twice"));
                continue;
            }
            let path = join(path, field.name);
            let plan = match &field.kind {
                FieldKind::Exact(want) => self.one(json, &at, &path, Some(*want)).map(Plan::One),
                FieldKind::Any => self.one(json, &at, &path, None).map(Plan::One),
                FieldKind::Map => self.map(json, &at, &path).map(Plan::Map),
                FieldKind::Message(fields) => match json {
                    Json::Object(map) => Some(Plan::Message(self.fields(
                        fields,
                        Some(map),
                        &at,
                        &path,
                        false,
                    ))),
                    Json::Null => None,
                    other => {
                        self.faults
                            .push(Fault::new(at, format!("{other} is no map")));
                        None
                    }
                },
            };
            plans.extend(plan.map(|plan| (field.name, plan)));
        }
        plans
    }

    /// `None`: nothing is written, or it is wrong and noted.
    fn one(
        &mut self,
        json: &Json,
        at: &str,
        path: &str,
        want: Option<ValueType>,
    ) -> Option<Expression> {
        if json.is_null() || json.as_str() == Some("") {
            return None;
        }
        match Expression::compile_param(self.language, json, self.table) {
            Err(error) => {
                self.faults.push(Fault::new(at, error));
                None
            }
            Ok(expression) => {
                let ty = expression.value_type();
                for fault in expression.faults() {
                    self.faults.push(Fault::new(at, fault));
                }
                if let Some(want) = want.filter(|want| *want != ty) {
                    self.faults.push(Fault::new(
                        at,
                        format!("'{}' is {ty}, but the field is {want}", expression.text()),
                    ));
                }
                self.types.push((Arc::from(path), ty));
                Some(expression)
            }
        }
    }

    fn map(&mut self, json: &Json, at: &str, path: &str) -> Option<Vec<(Arc<str>, Expression)>> {
        let entries = match json {
            Json::Object(entries) => entries,
            Json::Null => return None,
            other => {
                self.faults
                    .push(Fault::new(at, format!("{other} is no map")));
                return None;
            }
        };
        let mut compiled = Vec::with_capacity(entries.len());
        for (key, json) in entries {
            let expression = self.one(json, &join(at, key), &join(path, key), None);
            compiled.extend(expression.map(|e| (Arc::from(key.as_str()), e)));
        }
        Some(compiled)
    }
}

/// Compiles the bindings of an instance of `template`, whose results are the attributes `outputs`; `None`: it has
/// none.
pub(super) fn bindings(
    table: &AttributeTable,
    outputs: Option<&AttributeTable>,
    template: &str,
    written: Option<&Map<String, Json>>,
    faults: &mut Vec<Fault>,
) -> Vec<Binding> {
    let Some(written) = written else {
        return Vec::new();
    };
    let Some(outputs) = outputs else {
        faults.push(Fault::new(
            "attributeBindings",
            format!("template {template} generates no attributes"),
        ));
        return Vec::new();
    };
    let mut bindings = Vec::with_capacity(written.len());
    for (attribute, json) in written {
        let at = join("attributeBindings", attribute);
        let Some(slot) = table.slot(attribute) else {
            faults.push(Fault::new(
                at,
                format!("unknown attribute {attribute}; declare it in an attributemanifest"),
            ));
            continue;
        };
        let want = table.type_of(slot);
        match Expression::compile_output(json.as_str().unwrap_or_default(), outputs) {
            Err(error) => faults.push(Fault::new(at, error)),
            Ok(expression) if expression.value_type() != want => {
                let ty = expression.value_type();
                let reason = format!("{ty} is bound to an attribute of type {want}");
                faults.push(Fault::new(at, reason));
            }
            Ok(expression) => bindings.push(Binding { slot, expression }),
        }
    }
    bindings
}

fn join(path: &str, key: &str) -> String {
    if path.is_empty() {
        key.to_owned()
    } else {
        format!("{path}.{key}")
    }
}
