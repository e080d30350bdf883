//! Components for tests: a core module written as text becomes one that exports the interfaces of templates.

use lateen_adapter::{Template, wit};
use wit_component::{ComponentEncoder, StringEncoding, embed_component_metadata};
use wit_parser::Resolve;

/// Makes a component of `core`, the text of a module whose exports are named as the component model's canonical ABI
/// names them (`lateen:adapter/listentry@0.1.0#handle`), for `templates`.
///
/// # Errors
/// When the text is no module, or it does not fit the interfaces.
pub fn component(core: &str, templates: &[&'static Template]) -> Result<Vec<u8>, String> {
    let fail = |e: &dyn std::fmt::Display| format!("{e:#}");
    let interfaces: Result<Vec<_>, _> = templates.iter().map(|t| wit::interface(t)).collect();
    let text = wit::package(&interfaces.map_err(|e| fail(&e))?);
    let mut resolve = Resolve::default();
    let package = resolve
        .push_str("adapter.wit", &text)
        .map_err(|e| fail(&e))?;
    let world = resolve
        .select_world(&[package], None)
        .map_err(|e| fail(&e))?;
    let mut module = wat::parse_str(core).map_err(|e| fail(&e))?;
    embed_component_metadata(&mut module, &resolve, world, StringEncoding::UTF8)
        .map_err(|e| fail(&e))?;
    ComponentEncoder::default()
        .module(&module)
        .and_then(|encoder| encoder.validate(true).encode())
        .map_err(|e| fail(&e))
}
