//! Route configurations made into tables.

use std::{collections::HashMap, sync::Arc};

use bytes::Bytes;
use lateen_protocols::envoy::{
    envoy::config::{core::v3 as core, route::v3 as proto},
    google::protobuf as pb,
};

use super::{
    Action, Conditions, Domains, FilterConfigs, ForwardPolicy, PathRewrite, Redirect, Route,
    RouteTable, VirtualHost, conditions::PathMatch, headers::HeaderOps, matcher::RegexRewrite,
    template::TemplateRewrite,
};
use crate::{
    config_error::ConfigError,
    filter::{RouteFilterConfig, ratelimit::Policies},
    head::Name,
    proto::invalid,
    shared::Shared,
};

pub(super) fn table(
    config: &proto::RouteConfiguration,
    shared: &Shared,
) -> Result<RouteTable, ConfigError> {
    let unsupported = [
        ("vhds", config.vhds.is_some()),
        (
            "cluster_specifier_plugins",
            !config.cluster_specifier_plugins.is_empty(),
        ),
        ("vhost_header", !config.vhost_header.is_empty()),
        (
            "request_mirror_policies",
            !config.request_mirror_policies.is_empty(),
        ),
        ("route_specifiers", !config.route_specifiers.is_empty()),
        (
            "ignore_path_parameters_in_path_matching",
            config.ignore_path_parameters_in_path_matching,
        ),
    ];
    if let Some((field, _)) = unsupported.iter().find(|(_, present)| *present) {
        return Err(invalid(*field, "not supported"));
    }
    let mut table = RouteTable {
        name: config.name.as_str().into(),
        domains: Domains::new(config.ignore_port_in_host_matching),
        vhosts: Vec::with_capacity(config.virtual_hosts.len()),
        request_headers: HeaderOps::compile(
            &config.request_headers_to_add,
            &config.request_headers_to_remove,
        )?,
        response_headers: HeaderOps::compile(
            &config.response_headers_to_add,
            &config.response_headers_to_remove,
        )?,
        internal_only: config.internal_only_headers.iter().map(Name::new).collect(),
        most_specific_wins: config.most_specific_header_mutations_wins,
    };
    let base = filter_configs(&[], &config.typed_per_filter_config, shared)?;
    for vhost in &config.virtual_hosts {
        let within = |error: ConfigError| error.within(format_args!("virtual host {}", vhost.name));
        let index = table.vhosts.len();
        table
            .vhosts
            .push(virtual_host(vhost, &base, config, shared).map_err(within)?);
        if vhost.domains.is_empty() {
            return Err(within(invalid("domains", "there are none")));
        }
        for domain in &vhost.domains {
            table.domains.add(domain, index).map_err(within)?;
        }
    }
    table.domains.sort();
    if config.validate_clusters.as_ref().is_some_and(|on| on.value) {
        table.require_clusters(shared)?;
    }
    Ok(table)
}

fn virtual_host(
    vhost: &proto::VirtualHost,
    base: &FilterConfigs,
    config: &proto::RouteConfiguration,
    shared: &Shared,
) -> Result<VirtualHost, ConfigError> {
    if vhost.matcher.is_some() || !vhost.route_specifiers.is_empty() {
        return Err(invalid("matcher", "not supported"));
    }
    if vhost.retry_policy_typed_config.is_some() {
        return Err(invalid("retry_policy_typed_config", "not supported"));
    }
    let mut filters = filter_configs(base, &vhost.typed_per_filter_config, shared)?;
    if let Some(cors) = vhost.cors.as_ref() {
        RouteFilterConfig::add_legacy_cors(&mut filters, cors)?;
    }
    let mut routes = Vec::with_capacity(vhost.routes.len());
    for (index, one) in vhost.routes.iter().enumerate() {
        let compiled = route(one, vhost, &filters, config, shared).map_err(|error| {
            if one.name.is_empty() {
                error.within(format_args!("routes[{index}]"))
            } else {
                error.within(format_args!("route {}", one.name))
            }
        })?;
        routes.push(compiled);
    }
    Ok(VirtualHost {
        name: vhost.name.as_str().into(),
        routes,
        rate_limits: Policies::compile(&vhost.rate_limits, &shared.layers)?,
        require_tls: vhost.require_tls(),
        request_headers: HeaderOps::compile(
            &vhost.request_headers_to_add,
            &vhost.request_headers_to_remove,
        )?,
        response_headers: HeaderOps::compile(
            &vhost.response_headers_to_add,
            &vhost.response_headers_to_remove,
        )?,
    })
}

fn route(
    route: &proto::Route,
    vhost: &proto::VirtualHost,
    base: &FilterConfigs,
    config: &proto::RouteConfiguration,
    shared: &Shared,
) -> Result<Route, ConfigError> {
    if !route.route_specifiers.is_empty() {
        return Err(invalid("route_specifiers", "not supported"));
    }
    let conditions = Conditions::compile(
        route
            .r#match
            .as_ref()
            .ok_or_else(|| invalid("match", "absent"))?,
        shared,
    )
    .map_err(|error| error.within("match"))?;
    let mut filters = filter_configs(base, &route.typed_per_filter_config, shared)?;
    let mut weighted_filters = Vec::new();
    let (rate_limits, include_vhost_rate_limits) = match route.action.as_ref() {
        Some(proto::route::Action::Route(action)) => (
            Policies::compile(&action.rate_limits, &shared.layers)?,
            action
                .include_vh_rate_limits
                .as_ref()
                .is_some_and(|include| include.value),
        ),
        _ => Default::default(),
    };
    let action = match route.action.as_ref() {
        Some(proto::route::Action::Route(action)) => {
            if let Some(cors) = action.cors.as_ref() {
                RouteFilterConfig::add_legacy_cors(&mut filters, cors)?;
            }
            if let Some(proto::route_action::ClusterSpecifier::WeightedClusters(weighted)) =
                action.cluster_specifier.as_ref()
            {
                for cluster in &weighted.clusters {
                    weighted_filters.push(filter_configs(
                        &filters,
                        &cluster.typed_per_filter_config,
                        shared,
                    )?);
                }
            }
            let rewrite = match (
                action.prefix_rewrite.as_str(),
                action.regex_rewrite.as_ref(),
            ) {
                ("", None) => by_template(action, &conditions)?,
                ("", Some(regex)) => {
                    PathRewrite::Regex(RegexRewrite::compile("regex_rewrite", regex)?)
                }
                (prefix, None) => PathRewrite::Prefix(prefix.to_owned().into()),
                (_, Some(_)) => {
                    return Err(invalid(
                        "regex_rewrite",
                        "given together with prefix_rewrite",
                    ));
                }
            };
            Action::Forward {
                policy: Box::new(ForwardPolicy::compile(
                    action,
                    route,
                    vhost,
                    &shared.layers,
                )?),
                rewrite,
            }
        }
        Some(proto::route::Action::Redirect(redirect)) => {
            Action::Redirect(Redirect::compile(redirect)?)
        }
        Some(proto::route::Action::DirectResponse(direct)) => direct_response(direct, config)?,
        Some(proto::route::Action::NonForwardingAction(_)) => {
            return Err(invalid("non_forwarding_action", "not supported"));
        }
        Some(proto::route::Action::FilterAction(_)) => {
            return Err(invalid("filter_action", "not supported"));
        }
        None => return Err(invalid("action", "absent")),
    };
    Ok(Route {
        name: Some(route.name.as_str())
            .filter(|name| !name.is_empty())
            .map(Arc::from),
        action,
        decorator: route
            .decorator
            .as_ref()
            .map(|decorator| decorator.operation.as_str().into()),
        decorator_propagates: route
            .decorator
            .as_ref()
            .is_some_and(|decorator| decorator.propagate.as_ref().is_none_or(|p| p.value)),
        metadata: route
            .metadata
            .as_ref()
            .map(|metadata| metadata.filter_metadata.clone())
            .unwrap_or_default(),
        rate_limits,
        include_vhost_rate_limits,
        conditions,
        request_headers: HeaderOps::compile(
            &route.request_headers_to_add,
            &route.request_headers_to_remove,
        )?,
        response_headers: HeaderOps::compile(
            &route.response_headers_to_add,
            &route.response_headers_to_remove,
        )?,
        filters,
        weighted_filters,
    })
}

/// What becomes of a path by `path_rewrite_policy`.
fn by_template(
    action: &proto::RouteAction,
    conditions: &Conditions,
) -> Result<PathRewrite, ConfigError> {
    let Some(policy) = action.path_rewrite_policy.as_ref() else {
        return Ok(PathRewrite::Keep);
    };
    let rewrite = match &conditions.path {
        PathMatch::Template(template) => TemplateRewrite::of_extension(policy, template),
        _ => Err(invalid("template", "goes with path_match_policy only")),
    };
    rewrite
        .map(PathRewrite::Template)
        .map_err(|error| error.within("path_rewrite_policy"))
}

fn direct_response(
    direct: &proto::DirectResponseAction,
    config: &proto::RouteConfiguration,
) -> Result<Action, ConfigError> {
    const DEFAULT_LIMIT: u32 = 4096; // Envoy: max_direct_response_body_size_bytes
    if direct.body_format.is_some() {
        return Err(invalid("body_format", "not supported"));
    }
    let status = u16::try_from(direct.status)
        .ok()
        .filter(|status| (200..600).contains(status))
        .ok_or_else(|| invalid("status", "not between 200 and 599"))?;
    let body = direct
        .body
        .as_ref()
        .map(data_source)
        .transpose()?
        .unwrap_or_default();
    let limit = config
        .max_direct_response_body_size_bytes
        .as_ref()
        .map_or(DEFAULT_LIMIT, |limit| limit.value);
    if body.len() > limit as usize {
        return Err(invalid("body", format!("longer than {limit} bytes")));
    }
    Ok(Action::Direct { status, body })
}

/// Reads a `DataSource`: inline text or a file.
///
/// # Errors
/// When the file cannot be read, or the source is of another kind.
pub fn data_source(source: &core::DataSource) -> Result<Bytes, ConfigError> {
    use core::data_source::Specifier;
    match source.specifier.as_ref() {
        Some(Specifier::InlineString(text)) => Ok(text.clone().into()),
        Some(Specifier::InlineBytes(bytes)) => Ok(bytes.clone().into()),
        Some(Specifier::Filename(file)) => std::fs::read(file)
            .map(Bytes::from)
            .map_err(|error| invalid(file.clone(), error.to_string())),
        Some(Specifier::EnvironmentVariable(_)) => {
            Err(invalid("environment_variable", "not supported"))
        }
        None => Err(invalid("data source", "empty")),
    }
}

fn filter_configs(
    base: &[(Arc<str>, RouteFilterConfig)],
    own: &HashMap<String, pb::Any>,
    shared: &Shared,
) -> Result<FilterConfigs, ConfigError> {
    let mut merged = base.to_vec();
    for (name, any) in own {
        let Some(config) = RouteFilterConfig::compile(any, shared)
            .map_err(|error| error.within(format_args!("filter {name}")))?
        else {
            continue;
        };
        match merged.iter_mut().find(|(n, _)| **n == **name) {
            Some((_, present)) => present.refine(config),
            None => merged.push((name.as_str().into(), config)),
        }
    }
    Ok(merged)
}
