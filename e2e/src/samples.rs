//! The YAML that ships with Lateen, built into the programs that need it.

/// Services, service accounts and deployments of Bookinfo.
pub const BOOKINFO: &str = include_str!("../../install/samples/bookinfo/bookinfo.yaml");
/// Gateway and routes that let the outside reach productpage.
pub const BOOKINFO_GATEWAY: &str = include_str!("../../install/samples/bookinfo/gateway.yaml");
/// Mesh-wide settings.
pub const MESH: &str = include_str!("../../install/config/mesh/mesh.yaml");
/// Services of the control plane and the ingress gateway.
pub const SERVICES: &str = include_str!("../../install/config/mesh/services.yaml");
/// Istio's default metrics and log entries.
pub const TELEMETRY: &str = include_str!("../../install/config/mixer/telemetry.yaml");
