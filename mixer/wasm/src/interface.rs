//! Whether a component has the interfaces it should have, type by type: what does not fit is refused at load, so that
//! no call can fail for it.

use lateen_adapter::wit::{self, Function, Interface, Shape};
use wasmtime::component::{
    Component, ComponentExportIndex,
    types::{ComponentFunc, ComponentItem, Type},
};

/// The one function of `interface` that `component` exports.
pub(crate) fn export(
    component: &Component,
    interface: &Interface,
) -> Result<ComponentExportIndex, String> {
    let name = wit::qualified(&interface.name);
    let absent = || format!("file: the component does not export {name}");
    let (item, instance) = component.get_export(None, &*name).ok_or_else(absent)?;
    if !matches!(item, ComponentItem::ComponentInstance(_)) {
        return Err(format!("file: its export {name} is no interface"));
    }
    let [function] = interface.functions.as_slice() else {
        return Err(format!("{name} is not for guests"));
    };
    let found = component.get_export(Some(&instance), function.name);
    let Some((ComponentItem::ComponentFunc(found), index)) = found else {
        return Err(format!("file: {name} has no function {}", function.name));
    };
    fits_function(&found, function)
        .map_err(|reason| format!("file: {name}, function {}: {reason}", function.name))?;
    Ok(index)
}

/// Whether `component` imports nothing but what Mixer lends.
pub(crate) fn imports(component: &Component) -> Result<(), String> {
    let engine = component.engine();
    let host = wit::shared::host();
    let host_name = wit::qualified(&host.name);
    let types_name = wit::qualified("types");
    let ty = component.component_type();
    for (name, import) in ty.imports(engine) {
        if name == types_name {
            continue;
        }
        if name != host_name {
            return Err(format!(
                "file: the component imports {name}, and there is only {host_name}; build it without WASI \
                 (componentize-py: --stub-wasi, jco componentize: --disable all)"
            ));
        }
        let ComponentItem::ComponentInstance(instance) = import.ty else {
            return Err(format!("file: its import {name} is no interface"));
        };
        for (label, item) in instance.exports(engine) {
            let found = match item.ty {
                ComponentItem::ComponentFunc(found) => found,
                ComponentItem::Type(_) => continue,
                _ => return Err(format!("file: {name} has no {label}")),
            };
            let function = host.functions.iter().find(|f| f.name == label);
            let function = function.ok_or_else(|| format!("file: {name} has no {label}"))?;
            fits_function(&found, function)
                .map_err(|reason| format!("file: {name}, function {label}: {reason}"))?;
        }
    }
    Ok(())
}

fn fits_function(found: &ComponentFunc, want: &Function) -> Result<(), String> {
    if found.async_() {
        return Err("it is async".to_owned());
    }
    let params: Vec<Type> = found.params().map(|(_, ty)| ty).collect();
    if params.len() != want.params.len() {
        return Err(format!(
            "it has {} parameters, not {}",
            params.len(),
            want.params.len()
        ));
    }
    for (ty, (label, shape)) in params.iter().zip(&want.params) {
        fits(ty, shape, label)?;
    }
    let results: Vec<Type> = found.results().collect();
    match (results.as_slice(), &want.result) {
        ([], None) => Ok(()),
        ([ty], Some(shape)) => fits(ty, shape, "result"),
        _ => Err("it returns something else".to_owned()),
    }
}

fn fits(ty: &Type, shape: &Shape, at: &str) -> Result<(), String> {
    let part = |ty: &Option<Type>, shape: Option<&Shape>, label: &str| match (ty, shape) {
        (None, None) => Ok(()),
        (Some(ty), Some(shape)) => fits(ty, shape, &format!("{at}.{label}")),
        _ => Err(differs(at, shape)),
    };
    match (ty, shape) {
        (Type::Bool, Shape::Bool)
        | (Type::U8, Shape::U8)
        | (Type::U32, Shape::U32)
        | (Type::U64, Shape::U64)
        | (Type::S32, Shape::S32)
        | (Type::S64, Shape::S64)
        | (Type::Float64, Shape::F64)
        | (Type::String, Shape::String) => Ok(()),
        (Type::List(list), Shape::List(of)) => fits(&list.ty(), of, at),
        (Type::Option(option), Shape::Option(of)) => fits(&option.ty(), of, at),
        (Type::Result(result), Shape::Result(ok, error)) => {
            part(&result.ok(), ok.as_deref(), "ok")?;
            part(&result.err(), error.as_deref(), "error")
        }
        (Type::Tuple(tuple), Shape::Tuple(of)) if tuple.types().len() == of.len() => tuple
            .types()
            .zip(of)
            .enumerate()
            .try_for_each(|(i, (ty, shape))| fits(&ty, shape, &format!("{at}.{i}"))),
        (Type::Record(record), Shape::Record(want)) => {
            let found: Vec<_> = record.fields().map(|f| f.name).collect();
            let wanted: Vec<_> = want.fields.iter().map(|(label, _)| &**label).collect();
            if found != wanted {
                return Err(named(at, "fields", &found, &wanted));
            }
            record
                .fields()
                .zip(&want.fields)
                .try_for_each(|(field, (label, shape))| {
                    fits(&field.ty, shape, &format!("{at}.{label}"))
                })
        }
        (Type::Variant(variant), Shape::Variant(want)) => {
            let found: Vec<_> = variant.cases().map(|c| c.name).collect();
            let wanted: Vec<_> = want.cases.iter().map(|(label, _)| &**label).collect();
            if found != wanted {
                return Err(named(at, "cases", &found, &wanted));
            }
            variant
                .cases()
                .zip(&want.cases)
                .try_for_each(|(case, (label, shape))| part(&case.ty, shape.as_ref(), label))
        }
        (Type::Enum(found), Shape::Enum(want)) => {
            let found: Vec<_> = found.names().collect();
            let wanted: Vec<_> = want.cases.iter().map(|c| &**c).collect();
            if found != wanted {
                return Err(named(at, "cases", &found, &wanted));
            }
            Ok(())
        }
        (_, shape) => Err(differs(at, Some(shape))),
    }
}

fn named(at: &str, what: &str, found: &[&str], wanted: &[&str]) -> String {
    format!(
        "{at} has the {what} {}, not {}; take the WIT of this version",
        found.join(", "),
        wanted.join(", ")
    )
}

fn differs(at: &str, want: Option<&Shape>) -> String {
    let want = match want {
        Some(shape) => shape
            .name()
            .map_or_else(|| format!("{shape:?}").to_lowercase(), str::to_owned),
        None => "nothing".to_owned(),
    };
    format!("{at} is not {want}; take the WIT of this version")
}
