//! The configuration this repository ships is without fault.
#![cfg(test)]

use std::fs;
use std::path::Path;

use lateen_config::Folder;

#[test]
fn shipped_configuration_has_no_problem() {
    let install = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../install");
    let folder = tempfile::tempdir().unwrap();
    let mut copied = 0;
    for part in ["config/mesh", "config/mixer", "samples/bookinfo"] {
        for entry in fs::read_dir(install.join(part)).unwrap() {
            let path = entry.unwrap().path();
            let name = format!(
                "{}-{}",
                part.replace('/', "-"),
                path.file_name().unwrap().to_string_lossy()
            );
            fs::copy(&path, folder.path().join(name)).unwrap();
            copied += 1;
        }
    }
    let set = Folder::open(folder.path()).unwrap().current();
    assert!(copied > 0 && !set.objects.is_empty());
    let problems: Vec<String> = set.problems.iter().map(ToString::to_string).collect();
    assert_eq!(problems, Vec::<String>::new());
}
