use super::*;
use crate::Spec;

const RULE: &str = "
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: { name: reviews }
spec: { host: reviews, subsets: [{ name: v1 }, { name: v2 }] }
";

fn routes(subset: &str) -> String {
    format!(
        "
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{ name: reviews }}
spec: {{ hosts: [reviews], http: [{{ route: [{{ destination: {{ host: reviews, subset: {subset} }} }}] }}] }}
"
    )
}

fn subset(set: &ConfigSet) -> Option<String> {
    set.objects.iter().find_map(|object| match &object.spec {
        Spec::VirtualService(service) => Some(service.http[0].route[0].destination.subset.clone()),
        _ => None,
    })
}

fn text(set: &ConfigSet) -> String {
    set.problems
        .iter()
        .map(|problem| format!("{problem}\n"))
        .collect()
}

#[test]
fn the_last_good_version_stays() {
    let directory = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| fs::write(directory.path().join(name), text).unwrap();
    write("rule.yaml", RULE);
    write("routes.yml", &routes("v1"));
    write("notes.txt", "not ours");
    let mut folder = Folder::open(directory.path()).unwrap();
    assert_eq!(
        (
            folder.current().objects.len(),
            folder.current().problems.len()
        ),
        (2, 0)
    );
    assert_eq!(folder.current().generation, 1);
    assert_eq!(folder.refresh().generation, 1, "nothing changed");

    write("routes.yml", "a: [");
    let set = folder.refresh();
    assert_eq!(subset(&set).as_deref(), Some("v1"), "no YAML");
    assert!(text(&set).starts_with("routes.yml:"), "{}", text(&set));

    write("routes.yml", &routes("v2").replace("route:", "ruote:"));
    assert_eq!(
        subset(&folder.refresh()).as_deref(),
        Some("v1"),
        "an unknown field"
    );

    write(
        "routes.yml",
        &routes("v2").replace("hosts: [reviews]", "hosts: [':']"),
    );
    assert_eq!(subset(&folder.refresh()).as_deref(), Some("v1"), "invalid");

    write("routes.yml", &routes("v3"));
    let set = folder.refresh();
    assert_eq!(subset(&set).as_deref(), Some("v1"), "an undefined subset");
    assert!(text(&set).contains("routes.yml:5: VirtualService default/reviews: spec.http[0].route[0].destination.subset: subset \"v3\""), "{}", text(&set));

    write("rule.yaml", &RULE.replace("v2", "v3"));
    let set = folder.refresh();
    assert_eq!(subset(&set).as_deref(), Some("v3"), "defined now");
    assert_eq!(set.problems, []);

    fs::remove_file(directory.path().join("rule.yaml")).unwrap();
    let set = folder.refresh();
    assert_eq!(set.objects.len(), 2, "the rule is still in use");
    assert!(
        text(&set).contains("routes still name its subsets"),
        "{}",
        text(&set)
    );

    fs::remove_file(directory.path().join("routes.yml")).unwrap();
    let set = folder.refresh();
    assert_eq!(
        (set.objects.len(), set.problems.len()),
        (0, 0),
        "{}",
        text(&set)
    );
}

#[test]
fn routes_to_what_never_was_are_not_let_in() {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("a.yaml"), routes("v1")).unwrap();
    let folder = Folder::open(directory.path()).unwrap();
    assert_eq!(folder.current().objects.len(), 0);
    assert_eq!(folder.current().problems.len(), 1);
}

#[test]
fn the_first_of_two_wins() {
    let directory = tempfile::tempdir().unwrap();
    fs::create_dir(directory.path().join("b")).unwrap();
    fs::write(directory.path().join("a.yaml"), RULE).unwrap();
    fs::write(directory.path().join("b/x.yaml"), RULE.replace("v2", "v3")).unwrap();
    let set = Folder::open(directory.path()).unwrap().current();
    assert_eq!(set.objects.len(), 1);
    assert_eq!(&*set.objects[0].origin.file, "a.yaml");
    assert!(text(&set).starts_with("b/x.yaml:4: DestinationRule default/reviews: metadata.name: already defined at a.yaml:2"), "{}", text(&set));
}

#[tokio::test]
async fn changes_are_seen() {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("rule.yaml"), RULE).unwrap();
    let mut watch = Folder::open(directory.path()).unwrap().watch().unwrap();
    assert_eq!(watch.borrow_and_update().objects.len(), 1);
    fs::write(directory.path().join("routes.yaml"), routes("v1")).unwrap();
    let limit = Duration::from_secs(20);
    let wait = tokio::time::timeout(limit, watch.wait_for(|set| set.objects.len() == 2)).await;
    assert!(wait.is_ok_and(|set| set.is_ok()));
    fs::remove_file(directory.path().join("routes.yaml")).unwrap();
    let wait = tokio::time::timeout(limit, watch.wait_for(|set| set.objects.len() == 1)).await;
    assert!(wait.is_ok_and(|set| set.is_ok()));
}
