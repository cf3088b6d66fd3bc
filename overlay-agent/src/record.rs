//! Reads JSON objects as Go's encoding/json does: keys match case-insensitively, of several matching keys the last in the
//! document wins, and `null` is ignored.

use std::{collections::BTreeMap, fmt};

use serde::de::{Deserialize, DeserializeOwned, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

/// A JSON object: its values as written, by lower-case key.
#[derive(Default)]
pub(crate) struct Record(BTreeMap<String, Box<RawValue>>);

impl Record {
    /// The JSON text of a value; `None` for `null`.
    pub(crate) fn text(&self, key: &str) -> Option<&str> {
        self.0.get(&key.to_ascii_lowercase()).map(|value| value.get())
    }

    /// A value; `None` also when it has another type.
    pub(crate) fn get<T: DeserializeOwned>(&self, key: &str) -> Option<T> {
        serde_json::from_str(self.text(key)?).ok()
    }
}

impl<'de> Deserialize<'de> for Record {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(Self::default())
    }
}

impl<'de> Visitor<'de> for Record {
    type Value = Self;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut entries: A) -> Result<Self, A::Error> {
        while let Some((key, value)) = entries.next_entry::<String, Box<RawValue>>()? {
            // Go ignores null: the value of an earlier key stays.
            if value.get() != "null" {
                self.0.insert(key.to_ascii_lowercase(), value);
            }
        }
        Ok(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_texts_than_one_object_are_refused() {
        for bad in ["", "{", "{} x", "[]", r#"{"a":}"#, "\u{fffd}"] {
            assert!(serde_json::from_str::<Record>(bad).is_err(), "{bad:?}");
        }
        for bad in [&b"{\"a\":\"\xff\"}"[..], b"{\"\xff\":1}"] {
            assert!(serde_json::from_slice::<Record>(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn the_last_of_several_keys_wins_and_null_is_ignored() {
        for (json, value) in [
            (r#"{"Key":1,"key":2}"#, Some("2")),
            (r#"{"key":2,"Key":1}"#, Some("1")),
            (r#"{"key":2,"key": [3, 4] }"#, Some("[3, 4]")),
            (r#"{"KEY":2,"Key": null }"#, Some("2")),
            (r#"{"key":null}"#, None),
        ] {
            assert_eq!(serde_json::from_str::<Record>(json).unwrap().text("Key"), value, "{json}");
        }
    }
}
