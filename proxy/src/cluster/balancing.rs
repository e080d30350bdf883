//! `load_balancing_policy`: typed policies, told in the words of `lb_policy` and its companions, so that there is one
//! reading of each.

use std::borrow::Cow;

use lateen_protocols::envoy::{
    envoy::{
        config::cluster::v3::{
            Cluster as Proto, LoadBalancingPolicy,
            cluster::{
                CommonLbConfig, LbConfig, LbPolicy, LeastRequestLbConfig, MaglevLbConfig,
                RingHashLbConfig, RoundRobinLbConfig, SlowStartConfig,
                common_lb_config::{
                    self as common, ConsistentHashingLbConfig, LocalityConfigSpecifier,
                },
                ring_hash_lb_config::HashFunction,
            },
        },
        extensions::load_balancing_policies::{
            cluster_provided::v3::ClusterProvided,
            common::v3::{
                ConsistentHashingLbConfig as TypedHashing, LocalityLbConfig,
                SlowStartConfig as TypedSlowStart, locality_lb_config as typed,
            },
            least_request::v3::{LeastRequest, least_request::SelectionMethod},
            maglev::v3::Maglev,
            random::v3::Random,
            ring_hash::v3::{RingHash, ring_hash::HashFunction as TypedHashFunction},
            round_robin::v3::RoundRobin,
            wrr_locality::v3::WrrLocality,
        },
    },
    google::protobuf as pb,
};

use crate::{
    config_error::ConfigError,
    proto::{invalid, unpack},
};

/// Deepest nesting of policies that hold policies.
const MAX_DEPTH: usize = 4;

/// The cluster with its typed policy as `lb_policy`; as it is when it has none.
///
/// # Errors
/// When no policy of the list is supported, or one has an option that is not and would change what happens.
pub(super) fn plain(proto: &Proto) -> Result<Cow<'_, Proto>, ConfigError> {
    let Some(list) = &proto.load_balancing_policy else {
        return Ok(Cow::Borrowed(proto));
    };
    let mut plain = proto.clone();
    plain.load_balancing_policy = None;
    plain.lb_config = None;
    let mut seen = Vec::new();
    if apply_first(list, &mut plain, &mut seen, 0)
        .map_err(|error| error.within("load_balancing_policy"))?
    {
        return Ok(Cow::Owned(plain));
    }
    Err(invalid(
        "load_balancing_policy",
        format!("none of these is supported: {}", seen.join(", ")),
    ))
}

/// Applies the first policy that is known, as Envoy does.
fn apply_first(
    list: &LoadBalancingPolicy,
    to: &mut Proto,
    seen: &mut Vec<String>,
    depth: usize,
) -> Result<bool, ConfigError> {
    if depth > MAX_DEPTH {
        return Err(invalid("policies", "nested too deep"));
    }
    for policy in &list.policies {
        let extension = policy.typed_extension_config.as_ref();
        let any = extension.and_then(|extension| extension.typed_config.as_ref());
        let any = any.ok_or_else(|| invalid("typed_extension_config", "absent"))?;
        if apply(any, to, seen, depth)? {
            return Ok(true);
        }
        seen.push(any.type_url.clone());
    }
    Ok(false)
}

fn apply(
    any: &pb::Any,
    to: &mut Proto,
    seen: &mut Vec<String>,
    depth: usize,
) -> Result<bool, ConfigError> {
    if let Some(config) = unpack::<RoundRobin>(any)? {
        to.set_lb_policy(LbPolicy::RoundRobin);
        to.lb_config = Some(LbConfig::RoundRobinLbConfig(RoundRobinLbConfig {
            slow_start_config: config.slow_start_config.map(slow_start),
        }));
        localities(to, config.locality_lb_config)?;
    } else if let Some(config) = unpack::<LeastRequest>(any)? {
        if config
            .enable_full_scan
            .as_ref()
            .is_some_and(|scan| scan.value)
            || config.selection_method() == SelectionMethod::FullScan
        {
            return Err(invalid("selection_method", "a full scan is not supported"));
        }
        to.set_lb_policy(LbPolicy::LeastRequest);
        to.lb_config = Some(LbConfig::LeastRequestLbConfig(LeastRequestLbConfig {
            choice_count: config.choice_count,
            active_request_bias: config.active_request_bias,
            slow_start_config: config.slow_start_config.map(slow_start),
        }));
        localities(to, config.locality_lb_config)?;
    } else if let Some(config) = unpack::<Random>(any)? {
        to.set_lb_policy(LbPolicy::Random);
        localities(to, config.locality_lb_config)?;
    } else if let Some(config) = unpack::<RingHash>(any)? {
        to.set_lb_policy(LbPolicy::RingHash);
        let function = match config.hash_function() {
            TypedHashFunction::DefaultHash | TypedHashFunction::XxHash => HashFunction::XxHash,
            TypedHashFunction::MurmurHash2 => HashFunction::MurmurHash2,
        };
        // Fields that newer messages have elsewhere, too.
        let mut hashing = config.consistent_hashing_lb_config.unwrap_or_default();
        hashing.use_hostname_for_hashing |= config.use_hostname_for_hashing;
        hashing.hash_balance_factor = hashing.hash_balance_factor.or(config.hash_balance_factor);
        to.lb_config = Some(LbConfig::RingHashLbConfig(RingHashLbConfig {
            minimum_ring_size: config.minimum_ring_size,
            hash_function: function.into(),
            maximum_ring_size: config.maximum_ring_size,
        }));
        consistent(to, hashing)?;
        if config.locality_weighted_lb_config.is_some() {
            by_weight(to);
        }
    } else if let Some(config) = unpack::<Maglev>(any)? {
        to.set_lb_policy(LbPolicy::Maglev);
        to.lb_config = Some(LbConfig::MaglevLbConfig(MaglevLbConfig {
            table_size: config.table_size,
        }));
        consistent(to, config.consistent_hashing_lb_config.unwrap_or_default())?;
        if config.locality_weighted_lb_config.is_some() {
            by_weight(to);
        }
    } else if let Some(config) = unpack::<WrrLocality>(any)? {
        let inner = config.endpoint_picking_policy;
        let inner = inner.ok_or_else(|| invalid("endpoint_picking_policy", "absent"))?;
        if !apply_first(&inner, to, seen, depth + 1)? {
            return Ok(false);
        }
        by_weight(to);
    } else if unpack::<ClusterProvided>(any)?.is_some() {
        to.set_lb_policy(LbPolicy::ClusterProvided);
    } else {
        return Ok(false);
    }
    Ok(true)
}

fn slow_start(config: TypedSlowStart) -> SlowStartConfig {
    SlowStartConfig {
        slow_start_window: config.slow_start_window,
        aggression: config.aggression,
        min_weight_percent: config.min_weight_percent,
    }
}

fn common_of(to: &mut Proto) -> &mut CommonLbConfig {
    to.common_lb_config.get_or_insert_default()
}

fn by_weight(to: &mut Proto) {
    common_of(to).locality_config_specifier = Some(
        LocalityConfigSpecifier::LocalityWeightedLbConfig(common::LocalityWeightedLbConfig {}),
    );
}

/// Which localities serve is the policy's to say, and no more the cluster's.
fn localities(to: &mut Proto, config: Option<LocalityLbConfig>) -> Result<(), ConfigError> {
    use typed::LocalityConfigSpecifier as Typed;
    let specifier = match config.and_then(|config| config.locality_config_specifier) {
        None => None,
        Some(Typed::LocalityWeightedLbConfig(_)) => {
            by_weight(to);
            return Ok(());
        }
        Some(Typed::ZoneAwareLbConfig(zone)) => {
            if zone.force_local_zone.is_some()
                || zone.force_locality_direct_routing
                || zone.locality_basis != 0
            {
                return Err(invalid(
                    "locality_lb_config.zone_aware_lb_config",
                    "force_local_zone, force_locality_direct_routing and locality_basis are not supported",
                ));
            }
            Some(LocalityConfigSpecifier::ZoneAwareLbConfig(
                common::ZoneAwareLbConfig {
                    routing_enabled: zone.routing_enabled,
                    min_cluster_size: zone.min_cluster_size,
                    fail_traffic_on_panic: zone.fail_traffic_on_panic,
                },
            ))
        }
    };
    if specifier.is_some() || to.common_lb_config.is_some() {
        common_of(to).locality_config_specifier = specifier;
    }
    Ok(())
}

fn consistent(to: &mut Proto, config: TypedHashing) -> Result<(), ConfigError> {
    if !config.hash_policy.is_empty() {
        return Err(invalid(
            "consistent_hashing_lb_config.hash_policy",
            "not supported: give it to the route",
        ));
    }
    common_of(to).consistent_hashing_lb_config = Some(ConsistentHashingLbConfig {
        use_hostname_for_hashing: config.use_hostname_for_hashing,
        hash_balance_factor: config.hash_balance_factor,
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use lateen_protocols::json;

    use super::*;

    fn cluster(policies: &str) -> Proto {
        json::from_yaml(&format!(
            "name: a\nload_balancing_policy: {{policies: [{policies}]}}"
        ))
        .unwrap()
    }

    const TYPES: &str = "type.googleapis.com/envoy.extensions.load_balancing_policies";

    #[test]
    fn the_first_known_policy_is_told_in_the_old_words() {
        let proto = cluster(&format!(
            "{{typed_extension_config: {{name: x, typed_config: {{'@type': type.googleapis.com/google.protobuf.Empty}}}}}}, \
             {{typed_extension_config: {{name: l, typed_config: {{'@type': {TYPES}.least_request.v3.LeastRequest, choice_count: 3, \
             locality_lb_config: {{locality_weighted_lb_config: {{}}}}}}}}}}"
        ));
        let plain = plain(&proto).unwrap();
        assert_eq!(plain.lb_policy(), LbPolicy::LeastRequest);
        let Some(LbConfig::LeastRequestLbConfig(config)) = &plain.lb_config else {
            panic!("{:?}", plain.lb_config);
        };
        assert_eq!(config.choice_count.as_ref().unwrap().value, 3);
        assert!(matches!(
            plain
                .common_lb_config
                .as_ref()
                .unwrap()
                .locality_config_specifier,
            Some(LocalityConfigSpecifier::LocalityWeightedLbConfig(_))
        ));
    }

    #[test]
    fn localities_by_weight_hold_another_policy() {
        let proto = cluster(&format!(
            "{{typed_extension_config: {{name: w, typed_config: {{'@type': {TYPES}.wrr_locality.v3.WrrLocality, \
             endpoint_picking_policy: {{policies: [{{typed_extension_config: {{name: r, typed_config: {{'@type': \
             {TYPES}.maglev.v3.Maglev, table_size: 101}}}}}}]}}}}}}}}"
        ));
        let plain = plain(&proto).unwrap();
        assert_eq!(plain.lb_policy(), LbPolicy::Maglev);
        assert!(plain.common_lb_config.is_some());
    }

    #[test]
    fn a_list_without_a_known_policy_says_what_it_has() {
        let proto = cluster(
            "{typed_extension_config: {name: x, typed_config: {'@type': type.googleapis.com/google.protobuf.Empty}}}",
        );
        let error = plain(&proto).unwrap_err().to_string();
        assert!(error.contains("google.protobuf.Empty"), "{error}");
    }
}
