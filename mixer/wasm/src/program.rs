//! A component: read, compiled, and found to be what the templates want.

use std::{
    fs::{File, Metadata},
    io::Read as _,
    os::unix::fs::MetadataExt as _,
    path::Path,
};

use lateen_adapter::{Template, wit};
use sha2::{Digest as _, Sha256};
use wasmtime::component::{Component, ComponentExportIndex, InstancePre};

use crate::{abi::Lowering, copies::State, engine::Shared, interface};

/// Largest component, in bytes. One with a Python interpreter inside has 20 MB.
const MAX_BYTES: u64 = 128 << 20;

/// The bytes of a component.
pub(crate) struct Source {
    pub(crate) bytes: Vec<u8>,
    pub(crate) sha256: [u8; 32],
    pub(crate) stamp: Stamp,
}

/// What tells one state of a file from another without reading it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stamp {
    inode: u64,
    bytes: u64,
    modified: (i64, i64),
}

impl From<&Metadata> for Stamp {
    fn from(metadata: &Metadata) -> Self {
        Self {
            inode: metadata.ino(),
            bytes: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
        }
    }
}

impl Source {
    /// Reads `file`, which must have the hash `sha256` if there is one.
    pub(crate) fn read(file: &Path, sha256: Option<[u8; 32]>) -> Result<Self, String> {
        let fail = |reason: &dyn std::fmt::Display| format!("file: {}: {reason}", file.display());
        let mut opened = File::open(file).map_err(|e| fail(&e))?;
        let metadata = opened.metadata().map_err(|e| fail(&e))?;
        if !metadata.is_file() {
            return Err(fail(&"it is no regular file"));
        }
        let mut bytes = Vec::new();
        let mut bounded = opened.by_ref().take(MAX_BYTES + 1);
        bounded.read_to_end(&mut bytes).map_err(|e| fail(&e))?;
        if bytes.len() as u64 > MAX_BYTES {
            return Err(fail(&format_args!("it is longer than {MAX_BYTES} bytes")));
        }
        let found: [u8; 32] = Sha256::digest(&bytes).into();
        if let Some(want) = sha256.filter(|want| *want != found) {
            return Err(format!(
                "sha256: {} has {}, not {}",
                file.display(),
                hex::encode(found),
                hex::encode(want)
            ));
        }
        Ok(Self {
            bytes,
            sha256: found,
            stamp: Stamp::from(&metadata),
        })
    }
}

/// A compiled component.
pub(crate) struct Program {
    pub(crate) shared: &'static Shared,
    pub(crate) instance: InstancePre<State>,
    pub(crate) configure: ComponentExportIndex,
    takes: Vec<Entry>,
}

/// How a template's instances are handled.
pub(crate) struct Entry {
    pub(crate) template: &'static Template,
    pub(crate) lowering: Lowering,
    pub(crate) handle: ComponentExportIndex,
}

impl Program {
    /// Compiles `source`, which must take `templates`. Takes long: do it on a thread that may block.
    pub(crate) fn compile(
        source: &Source,
        templates: &[&'static Template],
    ) -> Result<Self, String> {
        let shared = Shared::get()?;
        let fail = |error: wasmtime::Error| format!("file: it is no component: {error:#}");
        let component = Component::from_binary(&shared.engine, &source.bytes).map_err(fail)?;
        interface::imports(&component)?;
        let instance = shared
            .linker
            .instantiate_pre(&component)
            .map_err(|error| format!("file: it does not fit: {error:#}"))?;
        let configure = interface::export(&component, &wit::shared::handler())?;
        let mut takes = Vec::with_capacity(templates.len());
        for template in templates {
            let described = wit::interface(template).map_err(|e| e.to_string())?;
            takes.push(Entry {
                template,
                lowering: Lowering::of(template).map_err(|e| e.to_string())?,
                handle: interface::export(&component, &described)?,
            });
        }
        Ok(Self {
            shared,
            instance,
            configure,
            takes,
        })
    }

    /// Whether it was held against all of `templates`.
    pub(crate) fn knows(&self, templates: &[&'static Template]) -> bool {
        templates.iter().all(|t| self.entry(t).is_some())
    }

    /// How instances of `template` are handled.
    pub(crate) fn entry(&self, template: &Template) -> Option<&Entry> {
        self.takes.iter().find(|e| e.template.name == template.name)
    }
}
