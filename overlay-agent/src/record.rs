//! Parses JSON records as Go's encoding/json does: keys match case-insensitively, and of several matching keys the last in the
//! document wins. `serde_json::Map` does not keep the order of keys that differ in case.

use std::fmt;

use serde::de::{Deserialize, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

/// Parses a record and converts the keys of all objects to lower case, for [`field`].
pub(crate) fn read(json: &[u8]) -> serde_json::Result<Value> {
    serde_json::from_slice(json).map(|Folded(value)| value)
}

/// The value of a key in an object from [`read`]; `None` for `null`.
pub(crate) fn field<'a>(record: &'a Map<String, Value>, key: &str) -> Option<&'a Value> {
    record.get(&key.to_ascii_lowercase())
}

/// A value with lower-case keys in all objects.
struct Folded(Value);

impl<'de> Deserialize<'de> for Folded {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(FoldingVisitor).map(Self)
    }
}

struct FoldingVisitor;

impl<'de> Visitor<'de> for FoldingVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut record = Map::new();
        while let Some((key, Folded(value))) = entries.next_entry::<String, Folded>()? {
            // Go ignores null: the value of an earlier key stays.
            if !value.is_null() {
                record.insert(key.to_ascii_lowercase(), value);
            }
        }
        Ok(Value::Object(record))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(Folded(value)) = items.next_element()? {
            list.push(value);
        }
        Ok(Value::Array(list))
    }

    fn visit_unit<E: Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn values_are_unchanged() {
        let text = r#"{"a":[1,-2,0.5,"x\u00e9\n",true,null,{"b":{}}]}"#;
        let plain: Value = serde_json::from_str(text).unwrap();
        assert_eq!(read(text.as_bytes()).unwrap(), plain);
        for bad in ["", "{", "{} x", r#"{"a":}"#, "\u{fffd}"] {
            assert!(read(bad.as_bytes()).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn the_last_of_several_keys_wins_and_null_is_ignored() {
        for (text, value) in [
            (r#"{"Key":1,"key":2}"#, json!(2)),
            (r#"{"key":2,"Key":1}"#, json!(1)),
            (r#"{"key":2,"key":3}"#, json!(3)),
            (r#"{"KEY":2,"Key":null}"#, json!(2)),
        ] {
            let record = read(text.as_bytes()).unwrap();
            assert_eq!(field(record.as_object().unwrap(), "Key"), Some(&value), "{text}");
        }
        let nothing = read(br#"{"key":null}"#).unwrap();
        assert_eq!(field(nothing.as_object().unwrap(), "Key"), None);
    }
}
