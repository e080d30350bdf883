//! The contracts between Lateen's programs: `istio.mixer.v1`, `istio.v1.auth`, `istio.mcp.v1alpha1`,
//! `istio.policy.v1beta1`, `istio.mixer.adapter.model.v1beta1` (compiled from `proto/`), Envoy's v3
//! packages (re-exported from `envoy-types`), JSON and YAML in and out for all of them, and the
//! global attribute dictionary. No component logic.

pub mod dictionary;
pub mod json;

pub use envoy_types::pb as envoy;

/// The FileDescriptorSet of Istio's templates (`proto/istio/mixer/template`), each a file whose options say that
/// it is one, and of all that they import.
pub static TEMPLATES: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/templates.bin"));

/// Packages `google.*` that Envoy's generated types do not carry.
pub mod google {
    /// `google.rpc`: the status in Check answers.
    pub mod rpc {
        #![allow(
            clippy::all,
            unreachable_pub,
            missing_debug_implementations,
            reason = "generated"
        )]
        tonic::include_proto!("google.rpc");
    }
}

/// Istio's templates: what adapter processes get, and the services they have.
pub mod template {
    #![allow(
        clippy::all,
        clippy::allow_attributes_without_reason,
        unreachable_pub,
        reason = "generated"
    )]
    use super::istio;

    /// Template `checknothing`.
    pub mod checknothing {
        tonic::include_proto!("checknothing");
    }
    /// Template `listentry`.
    pub mod listentry {
        tonic::include_proto!("listentry");
    }
    /// Template `apikey`.
    pub mod apikey {
        tonic::include_proto!("apikey");
    }
    /// Template `authorization`.
    pub mod authorization {
        tonic::include_proto!("authorization");
    }
    /// Template `quota`.
    pub mod quota {
        tonic::include_proto!("quota");
    }
    /// Template `reportnothing`.
    pub mod reportnothing {
        tonic::include_proto!("reportnothing");
    }
    /// Template `metric`.
    pub mod metric {
        tonic::include_proto!("metric");
    }
    /// Template `logentry`.
    pub mod logentry {
        tonic::include_proto!("logentry");
    }
    /// Template `tracespan`.
    pub mod tracespan {
        tonic::include_proto!("tracespan");
    }
    /// Template `edge`.
    pub mod edge {
        tonic::include_proto!("edge");
    }
    /// Template `keyval`.
    pub mod keyval {
        tonic::include_proto!("keyval");
    }
}

/// Istio's packages.
pub mod istio {
    /// `istio.mixer.*`.
    pub mod mixer {
        /// `istio.mixer.v1`: Check and Report.
        pub mod v1 {
            #![allow(
                clippy::all,
                clippy::allow_attributes_without_reason,
                unreachable_pub,
                reason = "generated"
            )]
            tonic::include_proto!("istio.mixer.v1");

            /// `istio.mixer.v1.config`.
            pub mod config {
                /// What a control plane tells a proxy about calling Mixer.
                pub mod client {
                    tonic::include_proto!("istio.mixer.v1.config.client");
                }
            }
        }
        /// `istio.mixer.adapter.*`.
        pub mod adapter {
            /// `istio.mixer.adapter.model`.
            pub mod model {
                /// What Mixer and adapter processes say to each other.
                pub mod v1beta1 {
                    #![allow(
                        clippy::all,
                        clippy::allow_attributes_without_reason,
                        unreachable_pub,
                        reason = "generated"
                    )]
                    tonic::include_proto!("istio.mixer.adapter.model.v1beta1");
                }
            }
        }
    }
    /// `istio.v1.*`.
    pub mod v1 {
        /// `istio.v1.auth`: certificates.
        pub mod auth {
            #![allow(
                clippy::all,
                clippy::allow_attributes_without_reason,
                unreachable_pub,
                reason = "generated"
            )]
            tonic::include_proto!("istio.v1.auth");
        }
    }
    /// `istio.mcp.*`.
    pub mod mcp {
        /// `istio.mcp.v1alpha1`: generic configuration resources.
        pub mod v1alpha1 {
            #![allow(
                clippy::all,
                clippy::allow_attributes_without_reason,
                unreachable_pub,
                reason = "generated"
            )]
            tonic::include_proto!("istio.mcp.v1alpha1");
        }
    }
    /// `istio.policy.*`.
    pub mod policy {
        /// `istio.policy.v1beta1`: values as adapters see them.
        pub mod v1beta1 {
            #![allow(
                clippy::all,
                clippy::allow_attributes_without_reason,
                unreachable_pub,
                reason = "generated"
            )]
            tonic::include_proto!("istio.policy.v1beta1");
        }
    }
}
