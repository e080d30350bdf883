//! The contracts between Lateen's programs: `istio.mixer.v1`, `istio.v1.auth`, `istio.mcp.v1alpha1`,
//! `istio.policy.v1beta1`, `istio.mixer.adapter.model.v1beta1` (compiled from `proto/`), Envoy's v3
//! packages (re-exported from `envoy-types`), JSON and YAML in and out for all of them, and the
//! global attribute dictionary. No component logic.

pub mod dictionary;
pub mod json;

pub use envoy_types::pb as envoy;

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
