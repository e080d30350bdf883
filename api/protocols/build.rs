//! Compiles our protos with protox (no protoc needed) and cuts Envoy's descriptor set out of the
//! `envoy-types` package, so that Envoy's JSON and YAML can be read and written.

use std::{env, error::Error, fs, path::PathBuf, process::Command};

use prost::Message as _;
use prost_types::FileDescriptorSet;

#[path = "build/schema.rs"]
mod schema;

const PROTOS: &[&str] = &[
    "google/rpc/status.proto",
    "istio/mixer/v1/mixer.proto",
    "istio/mixer/v1/config/client/client_config.proto",
    "istio/v1/auth/ca.proto",
    "istio/mcp/v1alpha1/resource.proto",
    "istio/policy/v1beta1/type.proto",
    "istio/mixer/adapter/model/v1beta1/model.proto",
];

/// Istio's templates as adapter processes know them.
const TEMPLATES: &[&str] = &[
    "checknothing",
    "listentry",
    "apikey",
    "authorization",
    "quota",
    "reportnothing",
    "metric",
    "logentry",
    "tracespan",
    "edge",
    "keyval",
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=proto");
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=build");
    let out = PathBuf::from(env::var("OUT_DIR")?);

    let templates = TEMPLATES
        .iter()
        .map(|name| format!("istio/mixer/template/{name}.proto"));
    // prost's own types lose what options say in extensions; the compiler's bytes have it.
    let mut compiler = protox::Compiler::new(["proto"])?;
    compiler.include_imports(true).open_files(templates)?;
    fs::write(
        out.join("templates.bin"),
        compiler.encode_file_descriptor_set(),
    )?;

    let ours = protox::compile(PROTOS, ["proto"])?;
    let mut config = tonic_prost_build::Config::new();
    config.enable_type_names();
    config.type_name_domain(["."], "type.googleapis.com");
    let names: Vec<String> = ours.file.iter().map(|f| f.name().to_owned()).collect();
    let mut generated = ours.clone();
    generated.file.extend(
        compiler
            .file_descriptor_set()
            .file
            .into_iter()
            .filter(|f| !names.contains(&f.name().to_owned())),
    );
    tonic_prost_build::configure().compile_fds_with_config(generated, config)?;

    let mut all = envoy_descriptors()?;
    let known: Vec<String> = all.file.iter().map(|f| f.name().to_owned()).collect();
    all.file.extend(
        ours.file
            .into_iter()
            .filter(|f| !known.contains(&f.name().to_owned())),
    );
    for file in &mut all.file {
        file.source_code_info = None; // 2.7 MB of comments that nobody reads at run time
    }
    fs::write(out.join("descriptors.bin"), all.encode_to_vec())?;
    fs::write(out.join("schema.bin"), schema::schema(&all))?;
    Ok(())
}

/// The descriptor set that `envoy-types` ships beside its generated code.
fn envoy_descriptors() -> Result<FileDescriptorSet, Box<dyn Error>> {
    let manifest = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?).join("Cargo.toml");
    let output = Command::new(env::var("CARGO")?)
        .args([
            "metadata",
            "--format-version",
            "1",
            "--offline",
            "--filter-platform",
        ])
        .arg(env::var("TARGET")?)
        .arg("--manifest-path")
        .arg(manifest)
        .output()?;
    if !output.status.success() {
        return Err(format!(
            "cargo metadata failed: {}",
            String::from_utf8_lossy(&output.stderr)
        )
        .into());
    }
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    let package = metadata["packages"]
        .as_array()
        .and_then(|all| all.iter().find(|p| p["name"] == "envoy-types"))
        .ok_or("envoy-types is not among the dependencies")?;
    let folder = PathBuf::from(
        package["manifest_path"]
            .as_str()
            .ok_or("envoy-types has no manifest path")?,
    )
    .with_file_name("src/generated/types.bin");
    let bytes = fs::read(&folder).map_err(|e| {
        format!(
            "{}: {e}; does this version of envoy-types still ship its descriptor set?",
            folder.display()
        )
    })?;
    Ok(FileDescriptorSet::decode(bytes.as_slice())?)
}
