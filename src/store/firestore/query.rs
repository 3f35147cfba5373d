//! What is asked of Firestore about many documents.

use firestore::gcloud_sdk::google::firestore::v1::structured_query::field_filter::Operator;
use firestore::gcloud_sdk::google::firestore::v1::structured_query::filter::FilterType;
use firestore::gcloud_sdk::google::firestore::v1::structured_query::{
    CollectionSelector, Direction, FieldFilter, FieldReference, Filter, Order,
};
use firestore::gcloud_sdk::google::firestore::v1::value::ValueType;
use firestore::gcloud_sdk::google::firestore::v1::{self as wire, StructuredQuery};
use jiff::Timestamp;

use super::value;
use crate::store::Collection;
use crate::store::document::EDITED_AT;

/// Every document of a collection, in the order of their ids.
pub(super) fn all_of(collection: &str) -> StructuredQuery {
    StructuredQuery { from: vec![selector(collection)], order_by: vec![by("__name__")], ..Default::default() }
}

/// Users whose `operatorUpdatedAt` is later than `since`.
pub(super) fn edited_after(since: Timestamp) -> StructuredQuery {
    let since = value::from_time(since.max(Timestamp::UNIX_EPOCH)).map(ValueType::TimestampValue);
    StructuredQuery {
        from: vec![selector(Collection::Users.as_str())],
        r#where: Some(Filter {
            filter_type: Some(FilterType::FieldFilter(FieldFilter {
                field: Some(field(EDITED_AT)),
                op: Operator::GreaterThan.into(),
                value: Some(wire::Value { value_type: since }),
            })),
        }),
        order_by: vec![by(EDITED_AT)],
        ..Default::default()
    }
}

fn selector(collection: &str) -> CollectionSelector {
    CollectionSelector { collection_id: collection.to_owned(), all_descendants: false }
}

fn by(path: &str) -> Order {
    Order { field: Some(field(path)), direction: Direction::Ascending.into() }
}

fn field(path: &str) -> FieldReference {
    FieldReference { field_path: path.to_owned() }
}
