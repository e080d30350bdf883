//! Headers and trailers as scripts see them. Envoy: `HeaderMapWrapper`.

use std::{cell::RefCell, rc::Rc};

use mlua::{MetaMethod, String as LuaString, UserData, UserDataMethods, Value};

use super::run::{Head, Run};
use crate::head::{Headers, Name};

/// A list of headers.
#[derive(Debug)]
pub(super) struct HeaderMap {
    run: Rc<Run>,
    made: u64,
    trailers: Option<Rc<RefCell<Headers>>>,
}

impl HeaderMap {
    pub(super) fn of(run: &Rc<Run>) -> HeaderMap {
        HeaderMap {
            run: run.clone(),
            made: run.waits.get(),
            trailers: None,
        }
    }

    pub(super) fn of_trailers(run: &Rc<Run>, trailers: Rc<RefCell<Headers>>) -> HeaderMap {
        HeaderMap {
            trailers: Some(trailers),
            ..HeaderMap::of(run)
        }
    }

    fn read<T>(&self, see: impl FnOnce(&Headers) -> T) -> mlua::Result<T> {
        self.run.current(self.made)?;
        if let Some(trailers) = &self.trailers {
            return Ok(see(&trailers.borrow()));
        }
        Ok(match &*self.run.head.borrow() {
            Head::Request(head) => see(&head.headers),
            Head::Response(head) => see(&head.headers),
        })
    }

    fn change<T>(&self, make: impl FnOnce(&mut Headers) -> T) -> mlua::Result<T> {
        self.run.current(self.made)?;
        if let Some(trailers) = &self.trailers {
            return Ok(make(&mut trailers.borrow_mut()));
        }
        Ok(match &mut *self.run.head.borrow_mut() {
            Head::Request(head) => make(&mut head.headers),
            Head::Response(head) => make(&mut head.headers),
        })
    }

    /// A pseudo header (or `host`); `None` if there is no such.
    fn pseudo(&self, name: &[u8]) -> Option<Vec<u8>> {
        if self.trailers.is_some() {
            return None;
        }
        match (&*self.run.head.borrow(), name) {
            (Head::Request(head), b":method") => Some(head.method.to_vec()),
            (Head::Request(head), b":path") => Some(head.path.to_vec()),
            (Head::Request(head), b":authority" | b"host") => Some(head.authority.to_vec()),
            (Head::Request(head), b":scheme") => Some(head.scheme.to_vec()),
            (Head::Response(head), b":status") => Some(head.status.to_string().into_bytes()),
            _ => None,
        }
    }

    /// Changes a pseudo header; whether there is such.
    fn set_pseudo(&self, name: &[u8], value: &[u8]) -> mlua::Result<bool> {
        if self.trailers.is_some() {
            return Ok(false);
        }
        let mut head = self.run.head.borrow_mut();
        let field = match (&mut *head, name) {
            (Head::Request(head), b":method") => &mut head.method,
            (Head::Request(head), b":path") => &mut head.path,
            (Head::Request(head), b":authority" | b"host") => &mut head.authority,
            (Head::Request(head), b":scheme") => &mut head.scheme,
            (Head::Response(head), b":status") => {
                let status = std::str::from_utf8(value).ok().and_then(|v| v.parse().ok());
                head.status = status
                    .filter(|status| (200..600).contains(status))
                    .ok_or_else(|| mlua::Error::runtime(":status must be between 200-599"))?;
                return Ok(true);
            }
            _ => return Ok(false),
        };
        if value.is_empty() || !value.iter().all(|b| (0x21..0x7f).contains(b)) {
            return Err(mlua::Error::runtime("not a valid value of a pseudo header"));
        }
        *field = value.to_vec().into();
        Ok(true)
    }
}

impl UserData for HeaderMap {
    fn add_methods<M: UserDataMethods<Self>>(methods: &mut M) {
        methods.add_method("add", |_, this, (name, value): (LuaString, LuaString)| {
            let value = checked_value(&value)?;
            this.run.current(this.made)?;
            if this.set_pseudo(&lower(&name), &value)? {
                return Ok(());
            }
            let name = checked_name(&name)?;
            this.change(|headers| headers.append(name, value))
        });
        methods.add_method(
            "replace",
            |_, this, (name, value): (LuaString, LuaString)| {
                let value = checked_value(&value)?;
                this.run.current(this.made)?;
                if this.set_pseudo(&lower(&name), &value)? {
                    return Ok(());
                }
                let name = checked_name(&name)?;
                this.change(|headers| headers.set(name, value))
            },
        );
        methods.add_method("remove", |_, this, name: LuaString| {
            let name = Name::new(name.as_bytes());
            this.change(|headers| {
                headers.remove(&name);
            })
        });
        methods.add_method("get", |lua, this, name: LuaString| {
            this.run.current(this.made)?;
            let found = match this.pseudo(&lower(&name)) {
                Some(value) => Some(value),
                None => {
                    let name = Name::new(name.as_bytes());
                    this.read(|headers| {
                        crate::route::matcher::joined(headers, &name).map(|v| v.into_owned())
                    })?
                }
            };
            found.map(|value| lua.create_string(value)).transpose()
        });
        methods.add_method("getAtIndex", |lua, this, (name, at): (LuaString, usize)| {
            let name = Name::new(name.as_bytes());
            let found = this.read(|headers| headers.all(&name).nth(at).map(<[u8]>::to_vec))?;
            found.map(|value| lua.create_string(value)).transpose()
        });
        methods.add_method("getNumValues", |_, this, name: LuaString| {
            let name = Name::new(name.as_bytes());
            this.read(|headers| headers.all(&name).count())
        });
        // Responses in HTTP/1.1 have the standard's reason phrases.
        methods.add_method("setHttp1ReasonPhrase", |_, this, _phrase: LuaString| {
            this.run.current(this.made)
        });
        methods.add_meta_method(MetaMethod::Pairs, |lua, this, ()| {
            let mut all: Vec<(Vec<u8>, Vec<u8>)> = Vec::new();
            for name in [":authority", ":path", ":method", ":scheme", ":status"] {
                if let Some(value) = this.pseudo(name.as_bytes()) {
                    all.push((name.into(), value));
                }
            }
            this.read(|headers| {
                let each = headers.iter();
                all.extend(each.map(|(name, value)| (name.as_bytes().to_vec(), value.to_vec())));
            })?;
            let mut all = all.into_iter();
            lua.create_function_mut(move |lua, _: mlua::MultiValue| {
                let Some((name, value)) = all.next() else {
                    return Ok((Value::Nil, Value::Nil));
                };
                Ok((
                    Value::String(lua.create_string(name)?),
                    Value::String(lua.create_string(value)?),
                ))
            })
        });
    }
}

fn lower(name: &LuaString) -> Vec<u8> {
    name.as_bytes().to_ascii_lowercase()
}

/// A name that can stand in a head.
pub(super) fn checked_name(name: &LuaString) -> mlua::Result<Name> {
    let name = name.as_bytes();
    let token = |b: &u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(b);
    match !name.is_empty() && name.iter().all(token) {
        true => Ok(Name::new(&*name)),
        false => Err(mlua::Error::runtime("not a valid name of a header")),
    }
}

/// A value that can stand in a head.
pub(super) fn checked_value(value: &LuaString) -> mlua::Result<Vec<u8>> {
    let value = value.as_bytes();
    match value.iter().any(|b| matches!(b, b'\r' | b'\n' | 0)) {
        false => Ok(value.to_vec()),
        true => Err(mlua::Error::runtime("not a valid value of a header")),
    }
}
