//! Answers of guests, of the right and of any other type, and values on their way there and back.
#![no_main]

use lateen_adapter::{Value, ValueType, template};
use lateen_wasm::abi::{self, Lowering};
use libfuzzer_sys::fuzz_target;
use wasmtime::component::Val;

/// Makes values of bytes.
struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn byte(&mut self) -> u8 {
        let (byte, rest) = self.0.split_first().unwrap_or((&0, &[]));
        self.0 = rest;
        *byte
    }

    fn number(&mut self) -> u64 {
        (0..8).fold(0, |n, _| n << 8 | u64::from(self.byte()))
    }

    fn text(&mut self) -> String {
        let length = usize::from(self.byte() % 24).min(self.0.len());
        let (text, rest) = self.0.split_at(length);
        self.0 = rest;
        String::from_utf8_lossy(text).into_owned()
    }

    fn some<T>(&mut self, mut make: impl FnMut(&mut Self) -> T) -> Vec<T> {
        (0..self.byte() % 6).map(|_| make(self)).collect()
    }

    /// Of any type.
    fn any(&mut self, depth: u32) -> Val {
        match self.byte() % 14 {
            0 => Val::Bool(self.byte() & 1 == 1),
            1 => Val::U8(self.byte()),
            2 => Val::U32(self.number() as u32),
            3 => Val::U64(self.number()),
            4 => Val::S32(self.number() as i32),
            5 => Val::S64(self.number() as i64),
            6 => Val::Float64(f64::from_bits(self.number())),
            7 => Val::String(self.text()),
            _ if depth == 0 => Val::Option(None),
            8 => Val::List(self.some(|b| b.any(depth - 1))),
            9 => Val::Tuple(self.some(|b| b.any(depth - 1))),
            10 => Val::Option((self.byte() & 1 == 1).then(|| Box::new(self.any(depth - 1)))),
            11 => Val::Record(self.some(|b| (b.text(), b.any(depth - 1)))),
            12 => Val::Variant(self.text(), Some(Box::new(self.any(depth - 1)))),
            _ => {
                let inner = Some(Box::new(self.any(depth - 1)));
                Val::Result(if self.byte() & 1 == 1 { Ok(inner) } else { Err(inner) })
            }
        }
    }

    fn option(&mut self, make: impl FnOnce(&mut Self) -> Val) -> Val {
        Val::Option((self.byte() & 1 == 1).then(|| Box::new(make(self))))
    }

    fn record<const N: usize>(fields: [(&str, Val); N]) -> Val {
        Val::Record(fields.map(|(name, v)| (name.to_owned(), v)).to_vec())
    }

    fn pairs(&mut self) -> Val {
        Val::List(self.some(|b| Val::Tuple(vec![Val::String(b.text()), Val::String(b.text())])))
    }

    /// A status as a guest may give it.
    fn status(&mut self) -> Val {
        let code = Val::U32(u32::from(self.byte()));
        let message = Val::String(self.text());
        let direct = self.option(|b| {
            let code = Val::U32(b.number() as u32 % 1024);
            let body = Val::String(b.text());
            Self::record([("code", code), ("body", body), ("headers", b.pairs())])
        });
        Self::record([("code", code), ("message", message), ("direct-response", direct)])
    }

    /// What a value of type `ty` is made of.
    fn payload(&mut self, ty: ValueType) -> Val {
        match ty {
            ValueType::String | ValueType::EmailAddress | ValueType::Uri | ValueType::DnsName => {
                Val::String(self.text())
            }
            ValueType::Int64 => Val::S64(self.number() as i64),
            ValueType::Double => Val::Float64(f64::from_bits(self.number())),
            ValueType::Bool => Val::Bool(self.byte() & 1 == 1),
            ValueType::Timestamp => Self::record([
                ("seconds", Val::S64(self.number() as i64)),
                ("nanoseconds", Val::U32(self.number() as u32)),
            ]),
            ValueType::Duration => Self::record([
                ("seconds", Val::S64(self.number() as i64)),
                ("nanoseconds", Val::S32(self.number() as i32)),
            ]),
            ValueType::IpAddress => {
                let length = self.byte() % 20;
                Val::List((0..length).map(|_| Val::U8(self.byte())).collect())
            }
            ValueType::StringMap => self.pairs(),
        }
    }
}

fn there_and_back(value: &Value) {
    let Val::Variant(_, Some(payload)) = abi::variant(value) else {
        panic!("a value is a variant");
    };
    let back = abi::lift(&payload, value.value_type()).expect("what we made is read");
    assert_eq!(format!("{back:?}"), format!("{value:?}"));
}

fuzz_target!(|data: &[u8]| {
    let mut bytes = Bytes(data);
    for ty in ValueType::ALL {
        if let Ok(value) = abi::lift(&bytes.payload(ty), ty) {
            there_and_back(&value);
        }
    }
    let status = bytes.status();
    let valid = bytes.option(|b| Val::U64(b.number()));
    let count = bytes.option(|b| Val::S32(b.number() as i32));
    let window = bytes.option(|b| {
        Bytes::record([
            ("limit", Val::S64(b.number() as i64)),
            ("remaining", Val::S64(b.number() as i64)),
            ("reset-milliseconds", Val::U64(b.number())),
        ])
    });
    let check = [
        ("status", status.clone()),
        ("valid-milliseconds", valid.clone()),
        ("valid-use-count", count),
    ];
    let _checked = abi::check_result(&Bytes::record(check));
    let quota = [
        ("status", status),
        ("valid-milliseconds", valid),
        ("granted", Val::S64(bytes.number() as i64)),
        ("window", window),
    ];
    let _granted = abi::quota_result(&Bytes::record(quota));
    for template in [&template::KUBERNETES, &template::KEYVAL] {
        let lowering = Lowering::of(template).expect("built-in templates make interfaces");
        let fields = template.outputs.iter().map(|(name, ty)| {
            let value = bytes.option(|b| b.payload(*ty));
            ((*name).to_owned(), value)
        });
        let _output = lowering.output(&Val::Record(fields.collect()));
        let _other = lowering.output(&bytes.any(3));
    }
    while !bytes.0.is_empty() {
        let any = bytes.any(4);
        for ty in ValueType::ALL {
            let _value = abi::lift(&any, ty);
        }
        let _checked = abi::check_result(&any);
        let _granted = abi::quota_result(&any);
        let _parts = abi::checked_with_output(&any);
        let _handled = abi::handled(&any);
    }
});
