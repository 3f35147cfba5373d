//! Users, page by page.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{PATIENCE, UserError, UserView};
use crate::store::measured::Store;
use crate::store::{Collection, Fields, Name};
use crate::users::barred::{Bar, Mark};

/// Documents read at a time, and for one page: a filter may fit nobody.
const READ_AT_A_TIME: usize = 500;
const MOST_LOOKED_AT: usize = 5_000;
/// Users on a page.
pub const LONGEST_PAGE: usize = 500;

/// Bytes of a document's name.
const LONGEST_ID: usize = 1_500;

/// Which users are listed.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Filter {
    /// Of this login, as last seen.
    pub login: Option<String>,
    /// With this label.
    pub tag: Option<String>,
    /// Of this status.
    pub status: Option<String>,
    /// Not taken in for this: `ignored` or `forgotten`.
    pub barred: Option<String>,
    /// Behind this document, whatever it is named: a collection may hold more than users.
    pub after: Option<String>,
    /// At most so many.
    pub limit: Option<usize>,
}

impl Filter {
    fn fits(&self, fields: &Fields) -> bool {
        let text = |name: &str| fields.get(name).and_then(Value::as_str);
        let has_login = |login: &str| {
            let profiles = fields.get("profiles").and_then(Value::as_object);
            let mut logins =
                profiles.into_iter().flat_map(|all| all.values()).filter_map(|one| one.get("login"));
            logins.any(|known| known.as_str().is_some_and(|known| known.eq_ignore_ascii_case(login)))
        };
        let has_tag = |tag: &str| {
            let tags = fields.get("tags").and_then(Value::as_array);
            tags.is_some_and(|tags| tags.iter().any(|one| one.as_str() == Some(tag)))
        };
        self.login.as_deref().is_none_or(has_login)
            && self.tag.as_deref().is_none_or(has_tag)
            && self.status.as_deref().is_none_or(|status| text("status") == Some(status))
    }

    /// Whether every document fits.
    fn is_plain(&self) -> bool {
        self.login.is_none() && self.tag.is_none() && self.status.is_none() && self.barred.is_none()
    }

    fn page(&self) -> Result<usize, UserError> {
        if self.after.as_deref().is_some_and(|after| !is_id(after)) {
            return Err(UserError::Unfit("after: is no name of a document, such as twitch:12345".to_owned()));
        }
        match self.limit {
            Some(limit) if !(1..=LONGEST_PAGE).contains(&limit) => {
                Err(UserError::Unfit(format!("limit: must lie between 1 and {LONGEST_PAGE}")))
            }
            limit => Ok(limit.unwrap_or(100)),
        }
    }
}

/// A part of a list.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Page {
    /// In the order of their keys.
    pub users: Vec<UserView>,
    /// Where to go on; left out at the end. There may be more behind an empty page.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
}

/// Whether a document can have this name.
fn is_id(text: &str) -> bool {
    let is_reserved = matches!(text, "" | "." | "..") || (text.starts_with("__") && text.ends_with("__"));
    !is_reserved && text.len() <= LONGEST_ID && !text.contains(|c: char| c == '/' || c.is_control())
}

/// A page of users. No store has an index of what is asked for here: documents are read one after the other until the
/// page is full, or enough were looked at.
pub async fn list(store: &Store, filter: &Filter) -> Result<Page, UserError> {
    let most = filter.page()?;
    let wanted = match filter.barred.as_deref() {
        None => None,
        Some("ignored") => Some(Bar::Ignored),
        Some("forgotten") => Some(Bar::Forgotten),
        Some(_) => return Err(UserError::Unfit("barred: is ignored or forgotten".to_owned())),
    };
    let collection = if wanted.is_some() { Collection::Barred } else { Collection::Users };
    let other = if wanted.is_some() { Collection::Users } else { Collection::Barred };
    let mut page = Page { users: Vec::new(), next: filter.after.clone() };
    let at_a_time = if filter.is_plain() { most } else { READ_AT_A_TIME };
    let mut looked_at = 0;
    while page.users.len() < most && looked_at < MOST_LOOKED_AT {
        let after = page.next.as_deref().map(Arc::from);
        let read = store.list(collection.clone(), after, at_a_time, PATIENCE).await?;
        if read.is_empty() {
            page.next = None;
            return Ok(page);
        }
        looked_at += read.len();
        let names: Vec<_> = read
            .iter()
            .map(|(name, _)| Name { collection: other.clone(), id: Arc::clone(&name.id) })
            .collect();
        let others = store.get_many(&names, PATIENCE).await?;
        for ((name, listed), other) in read.into_iter().zip(others) {
            if page.users.len() == most {
                return Ok(page);
            }
            page.next = Some(name.id.to_string());
            let (document, barred) =
                if wanted.is_some() { (other, Some(listed)) } else { (Some(listed), other) };
            let is_wanted = wanted.is_none_or(|bar| {
                barred.as_ref().is_some_and(|document| Mark::read(&document.fields).bar == Some(bar))
            });
            let nothing = Fields::new();
            if is_wanted && filter.fits(document.as_ref().map_or(&nothing, |document| &document.fields)) {
                page.users.push(UserView::new(&name.id, document, barred.as_ref()));
            }
        }
    }
    Ok(page)
}
