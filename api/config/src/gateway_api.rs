//! Kubernetes Gateway API (`gateway.networking.k8s.io`): v1, and the experimental fields of it that are served.
//!
//! Only what is written; what it comes to beside Services, namespaces and grants is Pilot's business. What the API
//! refuses is in [`crate::review`].

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::object::Labels;

/// API group of the kinds here.
pub const GROUP: &str = "gateway.networking.k8s.io";

/// API group of InferencePool.
pub const INFERENCE_GROUP: &str = "inference.networking.k8s.io";

macro_rules! kinds {
    ($( $(#[$meta:meta])* $name:ident { $( $(#[$field_meta:meta])* $field:ident : $type:ty, )* } )*) => {$(
        $(#[$meta])*
        #[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
        #[serde(default, deny_unknown_fields, rename_all = "camelCase")]
        pub struct $name { $( $(#[$field_meta])* pub $field: $type, )* }
    )*};
}

kinds! {
    /// Who answers for Gateways of a class.
    GatewayClass {
        /// The controller.
        controller_name: String,
        /// Its parameters; not read.
        parameters_ref: Option<Value>,
        /// For people.
        description: Option<String>,
    }

    /// Listeners, and where they are.
    Gateway {
        /// Class.
        gateway_class_name: String,
        /// Listeners.
        listeners: Vec<Listener>,
        /// Addresses wanted; of type Hostname, the Services that stand for it.
        addresses: Vec<Address>,
        /// Labels and annotations of what is deployed for it; not read.
        infrastructure: Option<Value>,
        /// Which ListenerSets may add listeners; unset: none.
        allowed_listeners: Option<AllowedListeners>,
        /// TLS of all listeners.
        tls: Option<GatewayTls>,
        /// Whether routes without parents attach; not supported.
        default_scope: Option<String>,
    }

    /// More listeners of a Gateway.
    ListenerSet {
        /// The Gateway.
        parent_ref: ParentReference,
        /// Listeners.
        listeners: Vec<Listener>,
    }

    /// One listener.
    Listener {
        /// Name, unique in its object.
        name: String,
        /// Host name or wildcard; unset: all.
        hostname: Option<String>,
        /// Port of the Service.
        port: u32,
        /// `HTTP`, `HTTPS`, `TLS`, `TCP`; `HBONE`.
        protocol: String,
        /// TLS.
        tls: Option<ListenerTls>,
        /// Which routes may attach; unset: of its kinds, of its namespace.
        allowed_routes: Option<AllowedRoutes>,
    }

    /// TLS of a listener.
    ListenerTls {
        /// `Terminate` unless set, or `Passthrough`.
        mode: Option<String>,
        /// Secrets with certificate and key.
        certificate_refs: Vec<ObjectReference>,
        /// Of older versions: see [`GatewayTls::frontend`].
        frontend_validation: Option<FrontendValidation>,
        /// Options of implementations.
        options: BTreeMap<String, String>,
    }

    /// TLS of all of a Gateway's listeners.
    GatewayTls {
        /// Towards backends.
        backend: Option<BackendTls>,
        /// Towards clients.
        frontend: Option<FrontendTls>,
    }

    /// TLS towards backends.
    BackendTls {
        /// Secret with the Gateway's own certificate; not supported.
        client_certificate_ref: Option<ObjectReference>,
    }

    /// Certificates of clients.
    FrontendTls {
        /// For ports without their own.
        default: FrontendConfig,
        /// By port.
        per_port: Vec<FrontendPort>,
    }

    /// Certificates of clients of one port.
    FrontendPort {
        /// The port.
        port: u32,
        /// What they must be.
        tls: FrontendConfig,
    }

    /// Whether clients have certificates.
    FrontendConfig {
        /// Unset: they are not asked.
        validation: Option<FrontendValidation>,
    }

    /// By whom clients' certificates are signed.
    FrontendValidation {
        /// ConfigMaps (or Secrets) with `ca.crt`.
        ca_certificate_refs: Vec<ObjectReference>,
        /// `AllowValidOnly` unless set, or `AllowInsecureFallback`.
        mode: Option<String>,
    }

    /// An address of a Gateway.
    Address {
        /// `IPAddress` unless set, `Hostname`, or another's.
        #[serde(rename = "type")] address_type: Option<String>,
        /// The address.
        value: String,
    }

    /// Which ListenerSets may attach.
    AllowedListeners {
        /// By namespace.
        namespaces: Option<Namespaces>,
    }

    /// Which routes may attach.
    AllowedRoutes {
        /// By namespace; unset: the listener's own.
        namespaces: Option<Namespaces>,
        /// By kind; empty: those of its protocol.
        kinds: Vec<RouteKind>,
    }

    /// Namespaces.
    Namespaces {
        /// `Same`, `All`, `Selector`, `None`.
        from: Option<String>,
        /// With `Selector`.
        selector: Option<Selector>,
    }

    /// Labels that must match: all of both.
    Selector {
        /// Equal.
        match_labels: Labels,
        /// Others.
        match_expressions: Vec<SelectorExpression>,
    }

    /// One condition on labels.
    SelectorExpression {
        /// The label.
        key: String,
        /// `In`, `NotIn`, `Exists`, `DoesNotExist`.
        operator: String,
        /// With `In` and `NotIn`.
        values: Vec<String>,
    }

    /// A kind of route.
    RouteKind {
        /// Gateway API's unless set.
        #[serde(skip_serializing_if = "Option::is_none")] group: Option<String>,
        /// Kind.
        kind: String,
    }

    /// What a route attaches to: a Gateway unless it says otherwise.
    ParentReference {
        /// Gateway API's unless set; empty for a Service.
        #[serde(skip_serializing_if = "Option::is_none")] group: Option<String>,
        /// `Gateway` unless set.
        #[serde(skip_serializing_if = "Option::is_none")] kind: Option<String>,
        /// Its own unless set.
        #[serde(skip_serializing_if = "Option::is_none")] namespace: Option<String>,
        /// Name.
        name: String,
        /// One listener.
        #[serde(skip_serializing_if = "Option::is_none")] section_name: Option<String>,
        /// Listeners of one port; of a Service, that port.
        #[serde(skip_serializing_if = "Option::is_none")] port: Option<u16>,
    }

    /// Another object.
    ObjectReference {
        /// Group.
        group: Option<String>,
        /// Kind.
        kind: Option<String>,
        /// Name.
        name: String,
        /// Its own unless set.
        namespace: Option<String>,
    }

    /// HTTP routes.
    HttpRoute {
        /// Where they attach.
        parent_refs: Vec<ParentReference>,
        /// Attach to default Gateways; not supported.
        use_default_gateways: Option<String>,
        /// Hosts; empty: those of the listener.
        hostnames: Vec<String>,
        /// Rules.
        rules: Vec<HttpRule>,
    }

    /// One rule.
    HttpRule {
        /// Name.
        name: Option<String>,
        /// Any of them; empty: every request.
        matches: Vec<HttpMatch>,
        /// What to do.
        filters: Vec<HttpFilter>,
        /// Where to.
        backend_refs: Vec<HttpBackend>,
        /// Time limits.
        timeouts: Option<HttpTimeouts>,
        /// Retries.
        retry: Option<HttpRetry>,
        /// Sticky sessions; not supported.
        session_persistence: Option<Value>,
    }

    /// What a request must look like: all of it.
    HttpMatch {
        /// Path; unset: prefix `/`.
        path: Option<PathMatch>,
        /// Headers.
        headers: Vec<ValueMatch>,
        /// Query parameters.
        query_params: Vec<ValueMatch>,
        /// Method.
        method: Option<String>,
    }

    /// A path.
    PathMatch {
        /// `PathPrefix` unless set, `Exact`, `RegularExpression`.
        #[serde(rename = "type")] match_type: Option<String>,
        /// `/` unless set.
        value: Option<String>,
    }

    /// A header or query parameter.
    ValueMatch {
        /// `Exact` unless set, or `RegularExpression`.
        #[serde(rename = "type")] match_type: Option<String>,
        /// Name.
        name: String,
        /// Value.
        value: String,
    }

    /// One filter: the field that its type names.
    HttpFilter {
        /// Which.
        #[serde(rename = "type")] filter_type: String,
        /// Headers of requests.
        request_header_modifier: Option<HeaderModifier>,
        /// Headers of responses.
        response_header_modifier: Option<HeaderModifier>,
        /// Copies of requests.
        request_mirror: Option<RequestMirror>,
        /// A redirect.
        request_redirect: Option<RequestRedirect>,
        /// Another path or host.
        url_rewrite: Option<UrlRewrite>,
        /// Cross-origin requests.
        cors: Option<Cors>,
        /// External authorization; not supported.
        external_auth: Option<Value>,
        /// An implementation's own; none is supported.
        extension_ref: Option<Value>,
    }

    /// Header operations.
    HeaderModifier {
        /// Overwrite.
        set: Vec<Header>,
        /// Append.
        add: Vec<Header>,
        /// Remove.
        remove: Vec<String>,
    }

    /// A header.
    Header {
        /// Name.
        name: String,
        /// Value.
        value: String,
    }

    /// Copies of requests.
    RequestMirror {
        /// Where to.
        backend_ref: HttpBackend,
        /// How many, in whole percent; unset: all.
        percent: Option<u32>,
        /// How many.
        fraction: Option<Fraction>,
    }

    /// A share.
    Fraction {
        /// Of
        numerator: u32,
        /// so many; 100 unless set.
        denominator: Option<u32>,
    }

    /// A redirect.
    RequestRedirect {
        /// Scheme; unset: the request's.
        scheme: Option<String>,
        /// Host; unset: the request's.
        hostname: Option<String>,
        /// Path; unset: the request's.
        path: Option<PathModifier>,
        /// Port; unset: the scheme's, or the request's.
        port: Option<u16>,
        /// 302 unless set.
        status_code: Option<u32>,
    }

    /// Another path.
    PathModifier {
        /// `ReplaceFullPath` or `ReplacePrefixMatch`.
        #[serde(rename = "type")] modifier_type: String,
        /// The path.
        replace_full_path: Option<String>,
        /// The prefix.
        replace_prefix_match: Option<String>,
    }

    /// Another path or host towards the backend.
    UrlRewrite {
        /// Host.
        hostname: Option<String>,
        /// Path.
        path: Option<PathModifier>,
    }

    /// Cross-origin requests.
    Cors {
        /// Origins: exact, with `*`, or `*`.
        allow_origins: Vec<String>,
        /// Cookies and the like.
        allow_credentials: Option<bool>,
        /// Methods.
        allow_methods: Vec<String>,
        /// Request headers.
        allow_headers: Vec<String>,
        /// Response headers scripts may read.
        expose_headers: Vec<String>,
        /// Seconds a preflight answer holds; 5 unless set.
        max_age: Option<u32>,
    }

    /// A backend of HTTP and gRPC, with filters of its own.
    HttpBackend {
        /// Group; core unless set.
        group: Option<String>,
        /// `Service` unless set.
        kind: Option<String>,
        /// Name.
        name: String,
        /// Its own unless set.
        namespace: Option<String>,
        /// Port of the Service.
        port: Option<u16>,
        /// Share; 1 unless set.
        weight: Option<u32>,
        /// Filters.
        filters: Vec<HttpFilter>,
    }

    /// Time limits.
    HttpTimeouts {
        /// For the whole exchange.
        request: Option<String>,
        /// For one try.
        backend_request: Option<String>,
    }

    /// Retries.
    HttpRetry {
        /// Status codes.
        codes: Vec<u32>,
        /// So often.
        attempts: Option<u32>,
        /// At least so far apart.
        backoff: Option<String>,
    }

    /// gRPC routes.
    GrpcRoute {
        /// Where they attach.
        parent_refs: Vec<ParentReference>,
        /// Attach to default Gateways; not supported.
        use_default_gateways: Option<String>,
        /// Hosts; empty: those of the listener.
        hostnames: Vec<String>,
        /// Rules.
        rules: Vec<GrpcRule>,
    }

    /// One rule.
    GrpcRule {
        /// Name.
        name: Option<String>,
        /// Any of them; empty: every request.
        matches: Vec<GrpcMatch>,
        /// What to do.
        filters: Vec<HttpFilter>,
        /// Where to.
        backend_refs: Vec<HttpBackend>,
        /// Sticky sessions; not supported.
        session_persistence: Option<Value>,
    }

    /// What a call must look like: all of it.
    GrpcMatch {
        /// Service and method.
        method: Option<MethodMatch>,
        /// Headers.
        headers: Vec<ValueMatch>,
    }

    /// Service and method.
    MethodMatch {
        /// `Exact` unless set, or `RegularExpression`.
        #[serde(rename = "type")] match_type: Option<String>,
        /// Service; unset: any.
        service: Option<String>,
        /// Method; unset: any.
        method: Option<String>,
    }

    /// Routes by SNI, and routes of plain TCP (which have no host names).
    TcpRoute {
        /// Where they attach.
        parent_refs: Vec<ParentReference>,
        /// Attach to default Gateways; not supported.
        use_default_gateways: Option<String>,
        /// SNI; empty: those of the listener.
        hostnames: Vec<String>,
        /// Rules.
        rules: Vec<TcpRule>,
    }

    /// One rule.
    TcpRule {
        /// Name.
        name: Option<String>,
        /// Where to.
        backend_refs: Vec<HttpBackend>,
    }

    /// References into its namespace that are allowed.
    ReferenceGrant {
        /// Who may refer.
        from: Vec<GrantFrom>,
        /// To what.
        to: Vec<GrantTo>,
    }

    /// Who may refer.
    GrantFrom {
        /// Group.
        group: String,
        /// Kind.
        kind: String,
        /// Namespace.
        namespace: String,
    }

    /// To what.
    GrantTo {
        /// Group.
        group: String,
        /// Kind.
        kind: String,
        /// Unset: all of the kind.
        name: Option<String>,
    }

    /// TLS towards Services.
    BackendTlsPolicy {
        /// The Services.
        target_refs: Vec<PolicyTarget>,
        /// Whose certificate is right.
        validation: BackendValidation,
        /// Options of implementations; none is known.
        options: BTreeMap<String, String>,
    }

    /// A Service, or one port of it.
    PolicyTarget {
        /// Group.
        group: String,
        /// Kind.
        kind: String,
        /// Name.
        name: String,
        /// Name of the port.
        #[serde(skip_serializing_if = "Option::is_none")] section_name: Option<String>,
    }

    /// Whose certificate is right.
    BackendValidation {
        /// ConfigMaps with `ca.crt`.
        ca_certificate_refs: Vec<ObjectReference>,
        /// `System`.
        #[serde(rename = "wellKnownCACertificates")] well_known_ca_certificates: Option<String>,
        /// SNI, and the name of the certificate unless others are listed.
        hostname: String,
        /// Names of the certificate: any of them.
        subject_alt_names: Vec<SubjectAltName>,
    }

    /// A name of a certificate.
    SubjectAltName {
        /// `Hostname` or `URI`.
        #[serde(rename = "type")] name_type: String,
        /// With `Hostname`.
        hostname: Option<String>,
        /// With `URI`.
        uri: Option<String>,
    }
}

/// What an object of the group says.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs, reason = "each variant is the kind of its name")]
pub enum Kind {
    GatewayClass(GatewayClass),
    Gateway(Box<Gateway>),
    ListenerSet(ListenerSet),
    HttpRoute(HttpRoute),
    GrpcRoute(GrpcRoute),
    TlsRoute(TcpRoute),
    TcpRoute(TcpRoute),
    ReferenceGrant(ReferenceGrant),
    BackendTlsPolicy(BackendTlsPolicy),
    /// Only that it is there: its endpoint picker is not asked.
    InferencePool,
}

/// An object of the group, with the status that it carries.
#[derive(Clone, Debug, PartialEq)]
pub struct GatewayApi {
    /// What it says.
    pub kind: Kind,
    /// `status` as written, by us or by other controllers; `null` without one.
    pub status: Value,
}

/// Versions of a kind that are read; empty for kinds that are not.
#[must_use]
pub fn versions(group: &str, kind: &str) -> &'static [&'static str] {
    match (group, kind) {
        (GROUP, "GatewayClass" | "Gateway" | "HTTPRoute") => &["v1", "v1beta1"],
        (GROUP, "ListenerSet") => &["v1"],
        (GROUP, "GRPCRoute" | "TLSRoute") => &["v1", "v1alpha3", "v1alpha2"],
        (GROUP, "TCPRoute") => &["v1", "v1alpha2"],
        (GROUP, "ReferenceGrant") => &["v1", "v1beta1"],
        (GROUP, "BackendTLSPolicy") => &["v1", "v1alpha3"],
        (INFERENCE_GROUP, "InferencePool") => &["v1"],
        _ => &[],
    }
}
