//! Between JSON and Firestore's values.
//!
//! Times are the one thing JSON has no type for: they are RFC 3339 strings here and timestamps there, in the
//! fields that [`document::is_time`] names.

use std::collections::HashMap;

use firestore::gcloud_sdk::google::firestore::v1::value::ValueType;
use firestore::gcloud_sdk::google::firestore::v1::{ArrayValue, MapValue, Value as Wire};
use firestore::gcloud_sdk::prost_types::{NullValue, Timestamp as WireTime};
use jiff::Timestamp;
use serde_json::{Map, Number, Value, json};

use super::connection::away;
use crate::store::{Document, Fields, StoreError, Version, document};

/// Firestore's years: 1 to 9999.
const SECONDS: std::ops::RangeInclusive<i64> = -62_135_596_800..=253_402_300_799;

/// The fields as a tree, and the paths of those that are named.
pub(super) fn from_fields(fields: &Fields) -> (HashMap<String, Wire>, Vec<String>) {
    let mut tree = HashMap::new();
    let mut paths = Vec::with_capacity(fields.len());
    for (path, value) in fields {
        let segments: Vec<_> = path.split('.').collect();
        paths.push(segments.iter().map(|segment| quoted(segment)).collect::<Vec<_>>().join("."));
        let value = match value.as_str().filter(|_| document::is_time(path)).and_then(from_time_text) {
            Some(time) => ValueType::TimestampValue(time),
            None => from_json(value),
        };
        insert(&mut tree, &segments, Wire { value_type: Some(value) });
    }
    (tree, paths)
}

fn insert(tree: &mut HashMap<String, Wire>, path: &[&str], value: Wire) {
    match path {
        [] => {}
        [last] => drop(tree.insert((*last).to_owned(), value)),
        [first, rest @ ..] => {
            let place = tree.entry((*first).to_owned()).or_default();
            if !matches!(place.value_type, Some(ValueType::MapValue(_))) {
                place.value_type = Some(ValueType::MapValue(MapValue::default()));
            }
            if let Some(ValueType::MapValue(map)) = &mut place.value_type {
                insert(&mut map.fields, rest, value);
            }
        }
    }
}

/// A segment of a field's path. See `google.firestore.v1.Document.fields` on which need quotes.
fn quoted(segment: &str) -> String {
    let is_simple = segment.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
        && !segment.starts_with(|c: char| c.is_ascii_digit())
        && !segment.is_empty();
    if is_simple {
        segment.to_owned()
    } else {
        format!("`{}`", segment.replace('\\', "\\\\").replace('`', "\\`"))
    }
}

fn from_json(value: &Value) -> ValueType {
    let wire = |value: &Value| Wire { value_type: Some(from_json(value)) };
    match value {
        Value::Null => ValueType::NullValue(NullValue::NullValue.into()),
        Value::Bool(value) => ValueType::BooleanValue(*value),
        Value::Number(number) => match number.as_i64() {
            Some(integer) => ValueType::IntegerValue(integer),
            // Integers beyond 63 bits lose precision; none of ours gets there.
            None => ValueType::DoubleValue(number.as_f64().unwrap_or_default()),
        },
        Value::String(text) => ValueType::StringValue(text.clone()),
        Value::Array(values) => {
            ValueType::ArrayValue(ArrayValue { values: values.iter().map(wire).collect() })
        }
        Value::Object(fields) => ValueType::MapValue(MapValue {
            fields: fields.iter().map(|(name, value)| (name.clone(), wire(value))).collect(),
        }),
    }
}

/// A document as it was read.
pub(super) fn to_document(
    fields: HashMap<String, Wire>,
    update_time: Option<WireTime>,
) -> Result<Document, StoreError> {
    Ok(Document { fields: to_map(fields), version: to_version(update_time)? })
}

fn to_map(fields: HashMap<String, Wire>) -> Map<String, Value> {
    fields.into_iter().map(|(name, value)| (name, to_json(value))).collect()
}

fn to_json(value: Wire) -> Value {
    // An object stands where nobody expects one, so whoever reads the field takes it for what it is: unreadable.
    let unsupported = |what: &str| json!({ "unsupported": what });
    match value.value_type {
        None | Some(ValueType::NullValue(_)) => Value::Null,
        Some(ValueType::BooleanValue(value)) => Value::Bool(value),
        Some(ValueType::IntegerValue(value)) => Value::from(value),
        Some(ValueType::DoubleValue(value)) => {
            Number::from_f64(value).map_or_else(|| unsupported("double"), Value::Number)
        }
        Some(ValueType::TimestampValue(time)) => {
            to_time(time).map_or_else(|| unsupported("timestamp"), |time| to_time_text(time).into())
        }
        Some(ValueType::StringValue(text)) => Value::String(text),
        Some(ValueType::ArrayValue(array)) => array.values.into_iter().map(to_json).collect(),
        Some(ValueType::MapValue(map)) => Value::Object(to_map(map.fields)),
        Some(ValueType::BytesValue(_)) => unsupported("bytes"),
        Some(ValueType::ReferenceValue(_)) => unsupported("reference"),
        Some(ValueType::GeoPointValue(_)) => unsupported("geopoint"),
        Some(
            ValueType::FieldReferenceValue(_)
            | ValueType::VariableReferenceValue(_)
            | ValueType::FunctionValue(_)
            | ValueType::PipelineValue(_),
        ) => unsupported("expression"),
    }
}

/// Cut to microseconds, Firestore's precision; `None` outside its years.
pub(super) fn from_time(time: Timestamp) -> Option<WireTime> {
    let microseconds = time.as_microsecond();
    let seconds = microseconds.div_euclid(1_000_000);
    let nanos = i32::try_from(microseconds.rem_euclid(1_000_000) * 1_000).ok()?;
    SECONDS.contains(&seconds).then_some(WireTime { seconds, nanos })
}

fn from_time_text(text: &str) -> Option<WireTime> {
    from_time(text.parse().ok()?)
}

fn to_time(time: WireTime) -> Option<Timestamp> {
    Timestamp::new(time.seconds, time.nanos).ok()
}

/// With milliseconds as they are written everywhere else, unless somebody was more precise.
fn to_time_text(time: Timestamp) -> String {
    if time.subsec_nanosecond() % 1_000_000 == 0 { format!("{time:.3}") } else { format!("{time:.6}") }
}

/// When Firestore says the document was last changed, in microseconds, its precision.
pub(super) fn to_version(update_time: Option<WireTime>) -> Result<Version, StoreError> {
    let microseconds = update_time.and_then(|time| {
        let seconds = u64::try_from(time.seconds).ok()?.checked_mul(1_000_000)?;
        Some(seconds + u64::try_from(time.nanos).ok()? / 1_000)
    });
    microseconds.map(Version).ok_or_else(|| away("it answered without the time of the last change"))
}

pub(super) fn from_version(version: Version) -> WireTime {
    WireTime {
        seconds: i64::try_from(version.0 / 1_000_000).unwrap_or(i64::MAX),
        nanos: i32::try_from(version.0 % 1_000_000).map_or(0, |micros| micros * 1_000),
    }
}

#[cfg(test)]
mod tests {
    use firestore::gcloud_sdk::google::r#type::LatLng;

    use super::*;
    use crate::store::fields;

    #[test]
    fn what_is_written_is_read_back() {
        let written = fields(json!({
            "firstSeenAt": "2026-11-20T05:51:20.612Z", "at": "2026-11-20T05:51:20.000Z", "lastSeenAt": "soon",
            "operatorUpdatedAt": "1969-12-31T23:59:59.999999Z", "notes": "2026-11-20T05:51:20.612Z",
            "sessionCount": 3, "ratio": 0.5, "negative": -7, "status": null, "is": true,
            "tags": ["a", "b"], "applied": { "S@1": 5, "T.x@2": 6 },
        }));
        let (tree, paths) = from_fields(&written);
        assert_eq!(paths.len(), written.len());
        assert_eq!(to_map(tree.clone()), written);
        let is_time = |name: &str| matches!(tree[name].value_type, Some(ValueType::TimestampValue(_)));
        assert!(is_time("firstSeenAt") && is_time("at") && is_time("operatorUpdatedAt"));
        assert!(!is_time("lastSeenAt") && !is_time("notes"));
    }

    #[test]
    fn a_name_with_dots_is_a_path_and_odd_segments_are_quoted() {
        let (tree, paths) = from_fields(&fields(
            json!({ "profiles.twitch": { "id": "1" }, "profiles.you tube": 2, "p.4`\\x": 3 }),
        ));
        assert_eq!(paths, ["p.`4\\`\\\\x`", "profiles.twitch", "profiles.`you tube`"]);
        let wanted = json!({ "profiles": { "twitch": { "id": "1" }, "you tube": 2 }, "p": { "4`\\x": 3 } });
        assert_eq!(Value::Object(to_map(tree)), wanted);
    }

    #[test]
    fn what_json_cannot_say_is_an_object_that_nobody_reads() {
        for value in [
            ValueType::BytesValue(vec![1]),
            ValueType::ReferenceValue("projects/p".to_owned()),
            ValueType::GeoPointValue(LatLng { latitude: 1.0, longitude: 2.0 }),
            ValueType::DoubleValue(f64::NAN),
        ] {
            let shown = to_json(Wire { value_type: Some(value) });
            assert!(shown["unsupported"].is_string(), "{shown}");
        }
    }

    #[test]
    fn versions_are_microseconds() {
        let time = WireTime { seconds: 1_795_153_880, nanos: 612_345_000 };
        let version = to_version(Some(time)).unwrap();
        assert_eq!(version, Version(1_795_153_880_612_345));
        assert_eq!(from_version(version), time);
        assert!(to_version(None).is_err());
    }

    #[test]
    fn times_outside_of_firestores_years_stay_text() {
        assert_eq!(from_time_text("-000001-01-01T00:00:00Z"), None);
        assert!(from_time_text("9999-12-30T00:00:00Z").is_some());
    }
}
