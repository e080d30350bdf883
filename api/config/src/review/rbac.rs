//! The older authorization: ServiceRole, ServiceRoleBinding, ClusterRbacConfig.

use super::{At, Check};

pub(super) fn service_role(check: &mut Check<'_>, spec: &At<'_>) {
    let rules = spec.get("rules");
    if rules.count() == 0 {
        check.error(&rules, "at least one rule is required");
    }
    for rule in rules.items() {
        let mut any = false;
        for (name, not) in [
            ("services", ""),
            ("hosts", "notHosts"),
            ("paths", "notPaths"),
            ("methods", "notMethods"),
            ("ports", "notPorts"),
        ] {
            let (given, excluded) = (rule.get(name).count() > 0, rule.get(not).count() > 0);
            any |= given || excluded;
            if given && excluded {
                check.error(
                    &rule.get(not),
                    format!("{name} and {not} exclude each other"),
                );
            }
        }
        if !any && rule.get("constraints").count() == 0 {
            check.error(
                &rule,
                "says nothing; name services, methods, paths, ports or constraints",
            );
        }
        for port in rule
            .get("ports")
            .items()
            .chain(rule.get("notPorts").items())
        {
            if !(0..=65535).contains(&port.int()) {
                check.error(
                    &port,
                    format!("port {} is not between 0 and 65535", port.int()),
                );
            }
        }
        for constraint in rule.get("constraints").items() {
            let key = constraint.get("key");
            if key.text().is_empty() {
                check.error(&key, "missing; it is required");
            }
            let has_ports = rule.get("ports").count() + rule.get("notPorts").count() > 0;
            if key.text() == "destination.port" && has_ports {
                check.error(&key, "destination.port and ports exclude each other");
            }
            if constraint.get("values").count() == 0 {
                check.error(&constraint.get("values"), "at least one value is required");
            }
        }
    }
}

pub(super) fn service_role_binding(check: &mut Check<'_>, spec: &At<'_>) {
    let subjects = spec.get("subjects");
    if subjects.count() == 0 {
        check.error(&subjects, "at least one subject is required");
    }
    for at in subjects.items() {
        subject(check, &at);
    }
    let (reference, role) = (spec.get("roleRef"), spec.get("role"));
    let inline = spec.get("actions").count() > 0;
    let ways = usize::from(reference.is_set())
        + usize::from(!role.text().is_empty())
        + usize::from(inline);
    if ways != 1 {
        check.error(spec, "exactly one of roleRef, role and actions is required");
    }
    if reference.is_set() {
        if reference.str("kind") != "ServiceRole" {
            check.error(&reference.get("kind"), "must be ServiceRole");
        }
        if reference.str("name").is_empty() {
            check.error(&reference.get("name"), "missing; it is required");
        }
    }
    if role.text().strip_prefix('/').is_some_and(str::is_empty) {
        check.error(&role, "names no ServiceRole");
    }
}

fn subject(check: &mut Check<'_>, at: &At<'_>) {
    let lists = [
        "groups",
        "notGroups",
        "namespaces",
        "notNamespaces",
        "names",
        "notNames",
        "ips",
        "notIps",
    ];
    let any = !at.str("user").is_empty()
        || !at.str("group").is_empty()
        || at.get("properties").count() > 0
        || lists.iter().any(|name| at.get(name).count() > 0);
    if !any {
        check.error(
            at,
            "says nothing; name a user, groups, namespaces, names or properties",
        );
    }
    for name in ["names", "notNames"] {
        for item in at.get(name).items() {
            if item.text() == "*" {
                check.error(&item, "\"*\" is everybody, also without certificate; use user: \"*\" if that is meant");
            }
        }
    }
    for (property, first_class) in [
        ("source.principal", ["names", "notNames"]),
        ("source.namespace", ["namespaces", "notNamespaces"]),
        ("source.ip", ["ips", "notIps"]),
        ("request.auth.claims[groups]", ["groups", "notGroups"]),
    ] {
        let given = first_class.iter().any(|name| at.get(name).count() > 0);
        if given && at.get("properties").has(property) {
            check.error(
                &at.get("properties").get(property),
                format!(
                    "{property} and {} exclude each other",
                    first_class.join(", ")
                ),
            );
        }
    }
}

pub(super) fn config(check: &mut Check<'_>, spec: &At<'_>) {
    if check.subject.name != "default" {
        let reason = format!("a {} must be called default", check.subject.kind);
        check.error(&At::new(spec.value, "metadata.name"), reason);
    }
    for (mode, field) in [
        ("ON_WITH_INCLUSION", "inclusion"),
        ("ON_WITH_EXCLUSION", "exclusion"),
    ] {
        if spec.str("mode") == mode && !spec.has(field) {
            check.error(&spec.get(field), format!("required for {mode}"));
        }
    }
}
