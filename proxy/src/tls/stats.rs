//! What Envoy counts of the handshakes of a listener: `ssl.*`.

use std::{io, sync::OnceLock};

use rustls::{
    CertificateError, CommonState, Error, HandshakeKind, ProtocolVersion, crypto::aws_lc_rs,
};

use super::{cipher_name, curve_name, provider};
use crate::stats::{Counter, Scope};

/// Names of versions, as they are counted.
const VERSIONS: [&str; 2] = ["TLSv1.2", "TLSv1.3"];

/// The counters.
#[derive(Debug)]
pub struct TlsStats {
    scope: Scope,
    handshake: Counter,
    connection_error: Counter,
    session_reused: Counter,
    no_certificate: Counter,
    fail_verify_no_cert: Counter,
    fail_verify_error: Counter,
    fail_verify_san: Counter,
    // These appear with their first handshake, and are looked up once.
    versions: [OnceLock<Counter>; VERSIONS.len()],
    ciphers: Box<[OnceLock<Counter>]>,
    curves: Box<[OnceLock<Counter>]>,
}

impl TlsStats {
    /// The counters of a listener.
    pub fn new(scope: &Scope) -> TlsStats {
        let none = |length| std::iter::repeat_with(OnceLock::new).take(length).collect();
        TlsStats {
            scope: scope.clone(),
            handshake: scope.counter("ssl.handshake"),
            connection_error: scope.counter("ssl.connection_error"),
            session_reused: scope.counter("ssl.session_reused"),
            no_certificate: scope.counter("ssl.no_certificate"),
            fail_verify_no_cert: scope.counter("ssl.fail_verify_no_cert"),
            fail_verify_error: scope.counter("ssl.fail_verify_error"),
            fail_verify_san: scope.counter("ssl.fail_verify_san"),
            versions: Default::default(),
            ciphers: none(provider().cipher_suites.len()),
            curves: none(aws_lc_rs::ALL_KX_GROUPS.len()),
        }
    }

    /// A handshake came to its end.
    pub fn done(&self, connection: &CommonState) {
        self.handshake.inc();
        if connection.handshake_kind() == Some(HandshakeKind::Resumed) {
            self.session_reused.inc();
        }
        if connection.peer_certificates().is_none_or(<[_]>::is_empty) {
            self.no_certificate.inc();
        }
        let count = |place: Option<&OnceLock<Counter>>, name: &dyn Fn() -> String| {
            if let Some(place) = place {
                place.get_or_init(|| self.scope.counter(&name())).inc();
            }
        };
        let at = usize::from(connection.protocol_version() == Some(ProtocolVersion::TLSv1_3));
        if let Some(version) = VERSIONS.get(at) {
            count(self.versions.get(at), &|| format!("ssl.versions.{version}"));
        }
        if let Some(suite) = connection.negotiated_cipher_suite() {
            let at = provider()
                .cipher_suites
                .iter()
                .position(|known| known.suite() == suite.suite());
            let place = at.and_then(|at| self.ciphers.get(at));
            count(place, &|| format!("ssl.ciphers.{}", cipher_name(suite)));
        }
        if let Some(group) = connection.negotiated_key_exchange_group()
            && let Some(curve) = curve_name(group)
        {
            let at = aws_lc_rs::ALL_KX_GROUPS
                .iter()
                .position(|known| known.name() == group.name());
            let place = at.and_then(|at| self.curves.get(at));
            count(place, &|| format!("ssl.curves.{curve}"));
        }
    }

    /// A handshake failed. A peer that just left is not counted.
    pub fn failed(&self, error: &io::Error) {
        let cause = error
            .get_ref()
            .and_then(|cause| cause.downcast_ref::<Error>());
        match cause {
            Some(Error::NoCertificatesPresented) => self.fail_verify_no_cert.inc(),
            Some(Error::InvalidCertificate(
                CertificateError::NotValidForName
                | CertificateError::NotValidForNameContext { .. }
                // Our own rules about names.
                | CertificateError::Other(_),
            )) => self.fail_verify_san.inc(),
            Some(Error::InvalidCertificate(_)) => self.fail_verify_error.inc(),
            Some(_) => self.connection_error.inc(),
            None if error.kind() == io::ErrorKind::ConnectionRefused => self.connection_error.inc(),
            None => {}
        }
    }
}
