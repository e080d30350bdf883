//! Identities of the mesh: [`SpiffeId`] → [`TrustBundle`] (who vouches for whom) → [`Svid`] (what we
//! present) → verifiers and resolvers for rustls. No I/O: certificates come in as bytes, the newest one
//! is swapped in through a [`SvidCell`], and live connections never notice.

mod id;
mod bundle;
mod peer;
mod svid;
mod verify;

pub use bundle::{BundleError, TrustBundle};
pub use id::{IdError, SpiffeId, TrustDomain};
pub use peer::{PeerError, peer_identity};
pub use svid::{Svid, SvidCell, SvidError, certificate_pem};
pub use verify::{
    ClientAuth, PeerMatch, SpiffeClientVerifier, SpiffeServerVerifier, Trust, client_config,
    provider, server_config,
};

pub use rustls;
pub use rustls::pki_types;
