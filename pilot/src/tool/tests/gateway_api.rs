//! Gateway API and Ingress against Istio's own vectors, where they are: `NAME.yaml` in, `NAME.yaml.golden` (objects)
//! and `NAME.status.yaml.golden` (statuses) out.

use std::collections::BTreeSet;

use lateen_config::yaml::documents;

use super::super::convert::{convert, shown};
use super::*;

/// Where we say something else on purpose, or cannot say the same: file of the expected, and why.
const OTHERWISE: &[(&str, &str)] = &[];

/// The namespaces and Services that the vectors take for granted. All of them have the ports of [`PORTS`].
const SERVICES: &[(&str, &[&str])] = &[
    (
        "default",
        &[
            "httpbin",
            "httpbin-second",
            "httpbin-wildcard",
            "foo-svc",
            "httpbin-other",
            "example",
            "echo",
            "svc4",
            "httpbin-zero",
            "httpbin-mirror",
            "httpbin-foo",
            "httpbin-alt",
            "httpbin-bad",
            "echo-1",
            "echo-2",
            "echo-port",
            "not-found",
            "infpool-model1-ip-aaaaf2d6",
            "infpool-model2-ip-f857bff9",
        ],
    ),
    ("istio-system", &["httpbin", "istiod", "echo"]),
    ("apple", &["httpbin-apple"]),
    ("banana", &["httpbin-banana"]),
    ("cert", &["httpbin"]),
    ("service", &["my-svc"]),
    ("allowed-1", &["a-example", "b-example", "svc1", "svc2"]),
    ("allowed-2", &["a-example", "svc2", "svc3"]),
    ("group-namespace1", &["httpbin"]),
    ("group-namespace2", &["httpbin"]),
];

const PORTS: &str = "[{name: http, port: 80, targetPort: 8080}, {name: tcp, port: 34000}, {name: tcp-other, port: 34001}]";

/// What the vectors' names are resolved in.
fn world(input: &str) -> String {
    use std::fmt::Write as _;
    let mut text = String::new();
    let mut add = |document: String| write!(text, "---\n{document}\n").unwrap();
    add(
        "apiVersion: v1\nkind: Service\nmetadata: {name: istio-ingressgateway, namespace: istio-system}\n\
         spec: {ports: [{name: http, port: 80, targetPort: 8080}, {name: https, port: 443}, {name: tcp, port: 34000}, {name: tcp-other, port: 34001}]}\n\
         status: {loadBalancer: {ingress: [{ip: 1.2.3.4}]}}"
            .to_owned(),
    );
    for (namespace, names) in SERVICES {
        for name in *names {
            add(format!(
                "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec: {{ports: {PORTS}}}"
            ));
        }
    }
    for name in ["infpool-gen-ip-6580eb2c", "infpool-gen2-ip-97b729d1"] {
        add(format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: default}}\nspec: {{ports: [{{name: http, port: 54321}}]}}"
        ));
    }
    for (host, namespace) in [("example.com", "istio-system"), ("google.com", "default")] {
        add(format!(
            "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: fixture-{namespace}, namespace: {namespace}}}\n\
             spec: {{hosts: [{host}], resolution: DNS, ports: [{{name: http, number: 80, protocol: HTTP}}, {{name: tcp, number: 34000, protocol: TCP}}, {{name: tcp-other, number: 34001, protocol: TCP}}]}}"
        ));
    }
    let certificate = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let indented = |pem: String| pem.replace('\n', "\n    ");
    let pem = indented(certificate.cert.pem());
    let key = indented(certificate.signing_key.serialize_pem());
    for (namespace, name) in [
        ("istio-system", "my-cert-http"),
        ("istio-system", "my-cert-http2"),
        ("ns2", "ns2-cert"),
        ("ns3", "ns3-cert"),
        ("ns4", "ns4-cert"),
        ("cert", "cert"),
    ] {
        add(format!(
            "apiVersion: v1\nkind: Secret\nmetadata: {{name: {name}, namespace: {namespace}}}\nstringData:\n  tls.crt: |\n    {pem}\n  tls.key: |\n    {key}\n  ca.crt: |\n    {pem}"
        ));
    }
    for (namespace, name) in [("istio-system", "my-cert-http"), ("default", "auth-cert")] {
        add(format!(
            "apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: {name}, namespace: {namespace}}}\ndata:\n  ca.crt: |\n    {pem}"
        ));
    }
    for (namespace, name, key) in [
        ("istio-system", "malformed", "not-ca.crt"),
        ("istio-system", "malformed-trustbundle", "ca.crt"),
        ("default", "malformed", "not-ca.crt"),
    ] {
        add(format!(
            "apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: {name}, namespace: {namespace}}}\ndata: {{{key}: hello}}"
        ));
    }
    // Each namespace that the vector writes something in has a label, made of its name.
    let namespaces: BTreeSet<String> = documents(input)
        .unwrap()
        .iter()
        .filter_map(|document| {
            document.value["metadata"]["namespace"]
                .as_str()
                .map(str::to_owned)
        })
        .collect();
    for namespace in namespaces {
        let part = namespace.split('-').next().unwrap();
        add(format!(
            "apiVersion: v1\nkind: Namespace\nmetadata: {{name: {namespace}, labels: {{istio.io/test-name-part: {part}}}}}"
        ));
    }
    text
}

fn read(text: &str, file: &str) -> Vec<Object> {
    parse_file(file, text).0
}

/// Documents by what they are called, without times.
fn named(text: &str) -> BTreeMap<String, Value> {
    documents(text)
        .unwrap()
        .into_iter()
        .map(|document| by_name(document.value))
        .collect()
}

fn by_name(mut value: Value) -> (String, Value) {
    untimed(&mut value);
    let text = |name: &str| {
        value["metadata"][name]
            .as_str()
            .unwrap_or_default()
            .to_owned()
    };
    let name = format!(
        "{} {}/{}",
        value["kind"].as_str().unwrap_or_default(),
        text("namespace"),
        text("name")
    );
    (name, value)
}

fn untimed(value: &mut Value) {
    match value {
        Value::Object(map) => {
            for (name, value) in map.iter_mut() {
                if name == "lastTransitionTime" {
                    *value = json!("fake");
                }
                untimed(value);
            }
        }
        Value::Array(all) => all.iter_mut().for_each(untimed),
        _ => {}
    }
}

fn vectors(part: &str) -> Vec<PathBuf> {
    let Some(corpus) = std::env::var_os("LATEEN_CORPUS") else {
        eprintln!("LATEEN_CORPUS is not set: {part} is not run");
        return Vec::new();
    };
    let folder = Path::new(&corpus).join("pilot/extra").join(part);
    if !folder.is_dir() {
        eprintln!("not run: LATEEN_CORPUS has no {}", folder.display());
        return Vec::new();
    }
    let mut files: Vec<PathBuf> = std::fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| {
            path.extension()
                .is_some_and(|extension| extension == "yaml")
        })
        .collect();
    files.sort();
    files
}

/// What differs between the documents of a file and ours.
fn differences(expected: &Path, got: BTreeMap<String, Value>) -> Vec<String> {
    let Ok(text) = std::fs::read_to_string(expected) else {
        return Vec::new();
    };
    let expected = named(&text);
    let names: BTreeSet<&String> = expected.keys().chain(got.keys()).collect();
    let show = |value: Option<&Value>| value.map_or_else(|| "nothing".to_owned(), Value::to_string);
    names
        .into_iter()
        .filter(|name| expected.get(*name) != got.get(*name))
        .map(|name| {
            format!(
                "{name}\n  expected {}\n  got      {}",
                show(expected.get(name)),
                show(got.get(name))
            )
        })
        .collect()
}

fn judge(counted: &str, files: usize, wrong: BTreeMap<String, Vec<String>>) {
    let known = |file: &String| OTHERWISE.iter().any(|(name, _)| name == file);
    eprintln!("{counted}: {} of {files} files agree", files - wrong.len());
    for (file, all) in &wrong {
        eprintln!("{file}: {} documents differ", all.len());
    }
    let unknown: Vec<String> = wrong
        .into_iter()
        .filter(|(file, _)| !known(file))
        .map(|(file, all)| format!("{file}:\n{}", all.join("\n")))
        .collect();
    assert!(unknown.is_empty(), "{}", unknown.join("\n"));
}

#[test]
fn gateway_api_becomes_what_istio_makes_of_it() {
    let mut wrong = BTreeMap::new();
    let mut files = 0;
    for path in vectors("gateway-api") {
        let text = std::fs::read_to_string(&path).unwrap();
        let mut objects = read(&text, "vector.yaml");
        objects.extend(read(&world(&text), "world.yaml"));
        let output = convert(objects, "domain.suffix");
        let made = output
            .objects
            .iter()
            .map(|object| by_name(shown(object)))
            .collect();
        let said = output
            .statuses
            .iter()
            .map(|status| by_name(status.document()))
            .collect();
        for (suffix, got) in [("yaml.golden", made), ("status.yaml.golden", said)] {
            let expected = path.with_extension(suffix);
            files += usize::from(expected.exists());
            let differ = differences(&expected, got);
            if !differ.is_empty() {
                let name = expected.file_name().unwrap().to_string_lossy().into_owned();
                wrong.insert(name, differ);
            }
        }
    }
    judge("gateway-api", files, wrong);
}

#[test]
fn the_order_of_objects_makes_no_difference() {
    for path in vectors("gateway-api") {
        let text = std::fs::read_to_string(&path).unwrap();
        let mut objects = read(&text, "vector.yaml");
        objects.extend(read(&world(&text), "world.yaml"));
        let [forward, backward] = [false, true].map(|backward| {
            let mut objects = objects.clone();
            if backward {
                objects.reverse();
            }
            let output = convert(objects, "domain.suffix");
            let objects = output.objects.iter().map(|object| shown(object));
            let statuses = output.statuses.iter().map(|status| status.document());
            objects.chain(statuses).collect::<Vec<_>>()
        });
        for (one, other) in forward.iter().zip(&backward) {
            assert_eq!(one, other, "{}", path.display());
        }
        assert_eq!(forward.len(), backward.len(), "{}", path.display());
    }
}

#[test]
fn ingresses_become_what_istio_makes_of_them() {
    const MESH: &str = "
apiVersion: v1
kind: ConfigMap
metadata: {name: istio, namespace: istio-system}
data: {mesh: 'ingressControllerMode: DEFAULT'}
";
    let mut wrong = BTreeMap::new();
    let paths = vectors("ingress");
    for path in &paths {
        let text = std::fs::read_to_string(path).unwrap();
        let mut objects = read(&text, "vector.yaml");
        objects.extend(read(MESH, "mesh.yaml"));
        let made = convert(objects, "mydomain")
            .objects
            .iter()
            .map(|object| by_name(shown(object)))
            .collect();
        let expected = path.with_extension("yaml.golden");
        let differ = differences(&expected, made);
        if !differ.is_empty() {
            let name = expected.file_name().unwrap().to_string_lossy().into_owned();
            wrong.insert(name, differ);
        }
    }
    judge("ingress", paths.len(), wrong);
}
