//! Changes headers of requests and responses. Envoy: `envoy.filters.http.header_mutation`.

use std::{cell::RefCell, sync::Arc};

use lateen_protocols::envoy::envoy::{
    config::common::mutation_rules::v3::{
        HeaderMutation as MutationProto, header_mutation::Action,
    },
    extensions::filters::http::header_mutation::v3::{
        HeaderMutation as FilterProto, HeaderMutationPerRoute, Mutations as MutationsProto,
    },
};

use crate::{
    config_error::ConfigError,
    filter::{FilterContext, ResponseContext, RouteFilterConfig},
    format::Facts,
    head::{Headers, RequestHead, ResponseHead},
    info::StreamInfo,
    proto::invalid,
    reject::Reject,
    route::{Selected, headers::HeaderOps, matcher::StringMatch},
};

/// The filter of one connection manager.
#[derive(Debug)]
pub struct HeaderMutation {
    mutations: Mutations,
    most_specific_wins: bool,
}

/// What is changed, in order.
#[derive(Debug, Default)]
pub struct Mutations {
    request: Vec<Mutation>,
    response: Vec<Mutation>,
}

#[derive(Debug)]
enum Mutation {
    /// One removal or one addition.
    Op(HeaderOps),
    RemoveMatching(StringMatch),
}

impl HeaderMutation {
    /// Compiles the filter.
    ///
    /// # Errors
    /// When a mutation is not valid, or of something else than headers.
    pub fn compile(config: &FilterProto) -> Result<HeaderMutation, ConfigError> {
        Ok(HeaderMutation {
            mutations: Mutations::compile(config.mutations.as_ref())?,
            most_specific_wins: config.most_specific_header_mutations_wins,
        })
    }

    pub(super) fn on_request(
        &self,
        cx: &mut FilterContext<'_>,
        head: &mut RequestHead,
    ) -> Result<(), Reject> {
        let own = match cx.config(head) {
            Some(RouteFilterConfig::HeaderMutation(own)) => own.clone(),
            _ => Vec::new(),
        };
        let info = cx.info;
        if self.in_order(&own).all(|level| level.request.is_empty()) {
            return Ok(());
        }
        let route = cx.route(head).cloned();
        for mutation in self.in_order(&own).flat_map(|level| &level.request) {
            mutation.on_request(info, route.as_ref(), head);
        }
        Ok(())
    }

    pub(super) fn on_response(
        &self,
        cx: &ResponseContext<'_>,
        own: Option<&RouteFilterConfig>,
        head: &mut ResponseHead,
    ) {
        let own: &[_] = match own {
            Some(RouteFilterConfig::HeaderMutation(own)) => own,
            _ => &[],
        };
        for mutation in self.in_order(own).flat_map(|level| &level.response) {
            mutation.on_response(cx, head);
        }
    }

    /// The filter's own mutations, then those of the route's levels, of which the last has the last word.
    fn in_order<'a>(
        &'a self,
        levels: &'a [Arc<Mutations>],
    ) -> impl Iterator<Item = &'a Mutations> + 'a {
        let count = levels.len();
        let of_levels = (0..count).filter_map(move |at| match self.most_specific_wins {
            true => levels.get(at),
            false => levels.get(count - 1 - at),
        });
        std::iter::once(&self.mutations).chain(of_levels.map(|level| &**level))
    }
}

impl Mutations {
    /// Compiles a route's mutations.
    ///
    /// # Errors
    /// See [`HeaderMutation::compile`].
    pub fn compile_route(config: &HeaderMutationPerRoute) -> Result<Arc<Mutations>, ConfigError> {
        Mutations::compile(config.mutations.as_ref()).map(Arc::new)
    }

    fn compile(config: Option<&MutationsProto>) -> Result<Mutations, ConfigError> {
        let Some(config) = config else {
            return Ok(Mutations::default());
        };
        let unsupported = [
            (
                "query_parameter_mutations",
                config.query_parameter_mutations.is_empty(),
            ),
            (
                "response_trailers_mutations",
                config.response_trailers_mutations.is_empty(),
            ),
            (
                "request_trailers_mutations",
                config.request_trailers_mutations.is_empty(),
            ),
        ];
        if let Some((field, _)) = unsupported.iter().find(|(_, empty)| !empty) {
            return Err(invalid(*field, "not supported"));
        }
        let list = |field: &str, mutations: &[MutationProto]| {
            mutations
                .iter()
                .map(Mutation::compile)
                .collect::<Result<_, _>>()
                .map_err(|error| error.within(field))
        };
        Ok(Mutations {
            request: list("request_mutations", &config.request_mutations)?,
            response: list("response_mutations", &config.response_mutations)?,
        })
    }
}

impl Mutation {
    fn compile(mutation: &MutationProto) -> Result<Mutation, ConfigError> {
        Ok(match mutation.action.as_ref() {
            Some(Action::Remove(name)) => {
                Mutation::Op(HeaderOps::compile(&[], std::slice::from_ref(name))?)
            }
            Some(Action::Append(option)) => {
                Mutation::Op(HeaderOps::compile(std::slice::from_ref(option), &[])?)
            }
            Some(Action::RemoveOnMatch(rule)) => {
                let pattern = rule
                    .key_matcher
                    .as_ref()
                    .ok_or_else(|| invalid("key_matcher", "absent"))?;
                Mutation::RemoveMatching(StringMatch::compile("key_matcher", pattern)?)
            }
            None => return Err(invalid("action", "absent")),
        })
    }

    fn on_request(
        &self,
        info: &RefCell<StreamInfo>,
        route: Option<&Selected>,
        head: &mut RequestHead,
    ) {
        match self {
            Mutation::Op(ops) => {
                let values = ops.values(&Facts {
                    request: Some(head),
                    route,
                    ..Facts::of_connection(&info.borrow())
                });
                ops.apply(&mut head.headers, values);
            }
            Mutation::RemoveMatching(pattern) => remove_matching(pattern, &mut head.headers),
        }
    }

    fn on_response(&self, cx: &ResponseContext<'_>, head: &mut ResponseHead) {
        match self {
            Mutation::Op(ops) => {
                let values = ops.values(&Facts {
                    request: cx.request,
                    response: Some(head),
                    route: cx.route,
                    ..Facts::of_connection(&cx.info.borrow())
                });
                ops.apply(&mut head.headers, values);
            }
            Mutation::RemoveMatching(pattern) => remove_matching(pattern, &mut head.headers),
        }
    }
}

fn remove_matching(pattern: &StringMatch, headers: &mut Headers) {
    headers.retain(|name, _| !pattern.matches(name.as_bytes()));
}
