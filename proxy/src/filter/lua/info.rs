//! Facts of stream, connection and TLS, and metadata, as scripts see them.

use std::{cell::RefCell, rc::Rc, sync::Arc};

use lateen_protocols::envoy::google::protobuf as pb;
use mlua::{Lua, MetaMethod, Table, UserData, UserDataMethods, Value};

use super::{
    run::address,
    values::{fields_to_table, from_lua, to_lua},
};
use crate::info::{ConnectionInfo, StreamInfo, TlsInfo};

/// Envoy: `StreamInfoWrapper`.
#[derive(Debug)]
pub(super) struct Info(pub(super) Rc<RefCell<StreamInfo>>);

/// Metadata that cannot be changed.
#[derive(Debug)]
pub(super) struct Metadata(pub(super) pb::Struct);

#[derive(Debug)]
struct Dynamic(Rc<RefCell<StreamInfo>>);

/// Envoy: `ConnectionWrapper`.
#[derive(Debug)]
pub(super) struct Connection(pub(super) Rc<ConnectionInfo>);

#[derive(Debug)]
struct Tls(Rc<ConnectionInfo>);

impl UserData for Info {
    fn add_methods<M: UserDataMethods<Self>>(methods: &mut M) {
        methods.add_method("protocol", |_, this, ()| {
            Ok(this.0.borrow().protocol.map(|protocol| protocol.as_str()))
        });
        methods.add_method("routeName", |_, this, ()| {
            let name = this.0.borrow().route_name.clone();
            Ok(name.map(|name| name.to_string()).unwrap_or_default())
        });
        methods.add_method("downstreamLocalAddress", |_, this, ()| {
            Ok(address(this.0.borrow().connection.local))
        });
        methods.add_method("downstreamDirectLocalAddress", |_, this, ()| {
            Ok(address(this.0.borrow().connection.local))
        });
        methods.add_method("downstreamRemoteAddress", |_, this, ()| {
            Ok(address(this.0.borrow().downstream_remote))
        });
        methods.add_method("downstreamDirectRemoteAddress", |_, this, ()| {
            Ok(address(this.0.borrow().connection.direct_remote))
        });
        methods.add_method("requestedServerName", |_, this, ()| {
            let connection = this.0.borrow().connection.clone();
            let name = connection
                .requested_server_name
                .as_deref()
                .or_else(|| connection.tls.as_ref()?.server_name.as_deref());
            Ok(name.unwrap_or_default().to_owned())
        });
        methods.add_method("dynamicMetadata", |_, this, ()| Ok(Dynamic(this.0.clone())));
        methods.add_method("downstreamSslConnection", |_, this, ()| {
            let connection = this.0.borrow().connection.clone();
            Ok(connection.tls.is_some().then_some(Tls(connection)))
        });
    }
}

impl UserData for Metadata {
    fn add_methods<M: UserDataMethods<Self>>(methods: &mut M) {
        methods.add_method("get", |lua, this, key: String| {
            match this.0.fields.get(&key) {
                Some(value) => to_lua(lua, value),
                None => Ok(Value::Nil),
            }
        });
        methods.add_meta_method(MetaMethod::Pairs, |lua, this, ()| {
            pairs(lua, fields_to_table(lua, &this.0)?)
        });
    }
}

impl UserData for Dynamic {
    fn add_methods<M: UserDataMethods<Self>>(methods: &mut M) {
        methods.add_method("get", |lua, this, filter: String| {
            let info = this.0.borrow();
            let found = info.metadata.as_ref().and_then(|all| all.get(&filter));
            found.map(|fields| fields_to_table(lua, fields)).transpose()
        });
        methods.add_method(
            "set",
            |_, this, (filter, key, value): (String, String, Value)| {
                let fields = pb::Struct {
                    fields: [(key, from_lua(&value, 0)?)].into(),
                };
                this.0.borrow_mut().add_metadata(&filter, fields);
                Ok(())
            },
        );
        methods.add_meta_method(MetaMethod::Pairs, |lua, this, ()| {
            let all = lua.create_table()?;
            for (filter, fields) in this.0.borrow().metadata.iter().flat_map(|all| all.iter()) {
                all.set(filter.as_str(), fields_to_table(lua, fields)?)?;
            }
            pairs(lua, all)
        });
    }
}

fn pairs(lua: &Lua, table: Table) -> mlua::Result<(Value, Table)> {
    Ok((lua.globals().get("next")?, table))
}

impl UserData for Connection {
    fn add_methods<M: UserDataMethods<Self>>(methods: &mut M) {
        methods.add_method("ssl", |_, this, ()| {
            Ok(this.0.tls.is_some().then(|| Tls(this.0.clone())))
        });
    }
}

impl UserData for Tls {
    fn add_methods<M: UserDataMethods<Self>>(methods: &mut M) {
        fact(methods, "peerCertificatePresented", TlsInfo::is_mutual);
        fact(methods, "peerCertificateValidated", TlsInfo::is_mutual);
        fact(methods, "tlsVersion", |tls| tls.version);
        fact(methods, "ciphersuiteString", |tls| tls.cipher.clone());
        fact(methods, "subjectPeerCertificate", |tls| {
            text(&tls.peer_subject)
        });
        fact(methods, "subjectLocalCertificate", |tls| {
            text(&tls.local_subject)
        });
        fact(methods, "sha256PeerCertificateDigest", |tls| {
            text(&tls.peer_fingerprint)
        });
        fact(methods, "uriSanLocalCertificate", |tls| {
            tls.local_uri_san
                .iter()
                .map(|san| san.to_string())
                .collect::<Vec<_>>()
        });
        fact(methods, "uriSanPeerCertificate", |tls| {
            let all = tls.peer_uri_san.iter().chain(&tls.peer_more_uri_sans);
            all.map(|san| san.to_string()).collect::<Vec<_>>()
        });
        fact(methods, "dnsSansPeerCertificate", |tls| {
            tls.peer_dns_sans
                .iter()
                .map(|san| san.to_string())
                .collect::<Vec<_>>()
        });
    }
}

fn text(value: &Option<Arc<str>>) -> String {
    value.as_deref().unwrap_or_default().to_owned()
}

fn fact<M: UserDataMethods<Tls>, T: mlua::IntoLua + 'static>(
    methods: &mut M,
    name: &str,
    of: fn(&TlsInfo) -> T,
) {
    methods.add_method(name, move |_, this, ()| Ok(this.0.tls.as_deref().map(of)));
}
