//! What a session is told of the instances it will get: the types of their dynamic fields, as the template's
//! message `Type` has them.

use lateen_adapter::ValueType;
use prost::Message as _;
use prost_reflect::{DynamicMessage, Kind, MapKey, MessageDescriptor, Value};
use prost_types::Any;

use super::instance::RemoteInstance;

/// The types of `instance`, by its template's `Type`. Fields whose type is fixed are not in there.
pub fn inferred_type(instance: &RemoteInstance) -> Any {
    let Some(descriptor) = &instance.template.types else {
        return Any::default();
    };
    let mut message = DynamicMessage::new(descriptor.clone());
    for (path, ty) in &instance.types {
        set(&mut message, descriptor, path, *ty);
    }
    Any {
        type_url: format!("type.googleapis.com/{}", descriptor.full_name()),
        value: message.encode_to_vec(),
    }
}

/// Sets what stands at `path` (`value`, `dimensions.source`, `subject.properties.app`), if there is such a place.
fn set(
    message: &mut DynamicMessage,
    descriptor: &MessageDescriptor,
    path: &str,
    ty: ValueType,
) -> Option<()> {
    let (name, rest) = path.split_once('.').unwrap_or((path, ""));
    let field = descriptor.get_field_by_name(name)?;
    let number = Value::EnumNumber(ty.number());
    let value = match field.kind() {
        Kind::Message(entry) if field.is_map() => {
            let is_right = matches!(entry.map_entry_key_field().kind(), Kind::String)
                && matches!(entry.map_entry_value_field().kind(), Kind::Enum(_));
            let Value::Map(mut map) = message.get_field(&field).into_owned() else {
                return None;
            };
            if !is_right || rest.is_empty() {
                return None;
            }
            map.insert(MapKey::String(rest.to_owned()), number);
            Value::Map(map)
        }
        Kind::Message(inner) if !field.is_list() => {
            let Value::Message(mut nested) = message.get_field(&field).into_owned() else {
                return None;
            };
            set(&mut nested, &inner, rest, ty)?;
            Value::Message(nested)
        }
        Kind::Enum(_) if !field.is_list() => number,
        _ => return None,
    };
    message.try_set_field(&field, value).ok()
}
