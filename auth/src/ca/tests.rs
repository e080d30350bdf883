use super::*;

fn domain() -> TrustDomain {
    "cluster.local".parse().unwrap()
}

fn open(state: &Path) -> Result<Ca, CaError> {
    Ca::open(state, None, &domain(), SystemTime::now())
}

#[test]
fn the_root_outlives_a_restart() {
    let state = tempfile::tempdir().unwrap();
    let first = open(state.path()).unwrap().roots_pem().to_owned();
    let second = open(state.path()).unwrap().roots_pem().to_owned();
    assert_eq!(first, second);
    assert_eq!(
        fs::read_to_string(state.path().join("public/root-cert.pem")).unwrap(),
        first
    );
    let mode = fs::metadata(state.path().join("ca/ca-key.pem"))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn a_leftover_of_a_crash_is_no_ca() {
    let state = tempfile::tempdir().unwrap();
    let leftover = state.path().join(format!("ca.new-{}", std::process::id()));
    fs::create_dir_all(&leftover).unwrap();
    fs::write(leftover.join(KEY), "half").unwrap();
    open(state.path()).unwrap();
    assert!(!leftover.exists());
}

#[test]
fn damaged_state_is_refused() {
    for name in [CERT, KEY, ROOTS] {
        let state = tempfile::tempdir().unwrap();
        open(state.path()).unwrap();
        let file = state.path().join("ca").join(name);
        fs::write(&file, "").unwrap();
        assert!(
            matches!(open(state.path()), Err(CaError::Incomplete { missing, .. }) if missing == name)
        );
        fs::remove_file(&file).unwrap();
        let error = open(state.path()).unwrap_err();
        assert!(
            error.to_string().contains("Restore it from a backup"),
            "{error}"
        );
    }
}

#[test]
fn a_lost_key_is_not_replaced_silently() {
    let state = tempfile::tempdir().unwrap();
    open(state.path()).unwrap();
    fs::remove_dir_all(state.path().join("ca")).unwrap();
    assert!(matches!(open(state.path()), Err(CaError::Lost { .. })));
}

#[test]
fn a_foreign_key_is_refused() {
    let (state, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    open(state.path()).unwrap();
    open(other.path()).unwrap();
    fs::copy(
        other.path().join("ca").join(KEY),
        state.path().join("ca").join(KEY),
    )
    .unwrap();
    assert!(matches!(open(state.path()), Err(CaError::Mismatch { .. })));
}

#[test]
fn a_readable_key_is_refused() {
    let state = tempfile::tempdir().unwrap();
    open(state.path()).unwrap();
    let key = state.path().join("ca").join(KEY);
    fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).unwrap();
    assert!(matches!(open(state.path()), Err(CaError::Mode(_))));
}

/// As a pod gets it: a Secret that root owns and the pod's group may read, beside a state of its own.
#[test]
fn a_given_ca_is_used_and_not_changed() {
    let (made, state) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let roots = open(made.path()).unwrap().roots_pem().to_owned();
    let given = made.path().join("ca");
    let open = || Ca::open(state.path(), Some(&given), &domain(), SystemTime::now());
    for (mode, is_good) in [(0o400, true), (0o440, true), (0o444, false), (0o460, false)] {
        fs::set_permissions(given.join(KEY), fs::Permissions::from_mode(mode)).unwrap();
        match open() {
            Ok(ca) => assert!(is_good && ca.roots_pem() == roots, "{mode:o}"),
            Err(error) => assert!(!is_good && matches!(error, CaError::Mode(_)), "{error}"),
        }
    }
    assert!(!state.path().join("ca").exists());
    assert!(state.path().join("public/root-cert.pem").exists());
    fs::remove_dir_all(&given).unwrap();
    assert!(matches!(open(), Err(CaError::Incomplete { .. })));
}

#[test]
fn another_trust_domain_is_refused() {
    let state = tempfile::tempdir().unwrap();
    open(state.path()).unwrap();
    let error = Ca::open(
        state.path(),
        None,
        &"other.org".parse().unwrap(),
        SystemTime::now(),
    )
    .unwrap_err();
    assert!(matches!(error, CaError::TrustDomain { .. }), "{error}");
}

#[test]
fn an_expired_root_is_refused() {
    let state = tempfile::tempdir().unwrap();
    open(state.path()).unwrap();
    let later = SystemTime::now() + ROOT_LIFE;
    assert!(matches!(
        Ca::open(state.path(), None, &domain(), later),
        Err(CaError::Certificate { .. })
    ));
}

#[test]
fn serials_are_positive_and_differ() {
    let (one, two) = (serial().to_bytes(), serial().to_bytes());
    assert_ne!(one, two);
    assert!(one.len() == 16 && one[0] & 0x80 == 0);
}
