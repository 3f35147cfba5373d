//! Reading settings: text in, typed values or problems out, and every problem at once.
//!
//! Each section of settings lives with what it configures; this file only holds what they share. Flags and
//! environment arrive as text (clap's part), so that a bad value is reported beside all others instead of
//! ending the program at the first.

use std::collections::HashMap;
use std::fmt::Display;
use std::path::PathBuf;
use std::time::Duration;

use bytesize::ByteSize;

use crate::secret::Secret;

/// What was wrong with the settings, one line each: `NAME: what is wrong`.
#[derive(Debug, Default)]
pub struct Problems(Vec<String>);

impl Problems {
    /// Notes one problem of the setting `name`.
    pub fn add(&mut self, name: &str, what: impl Display) {
        self.0.push(format!("{name}: {what}"));
    }

    /// The value of `text`, or a noted problem.
    pub fn parse<T>(
        &mut self,
        name: &str,
        text: &str,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> Option<T> {
        let text = text.trim();
        if text.is_empty() {
            self.add(name, "is empty; leave it out for the default");
            return None;
        }
        parse(text).map_err(|what| self.add(name, what)).ok()
    }

    /// As [`Problems::parse`] for a setting that may be left out (or be empty, which is the same). The outer
    /// `None` is a noted problem.
    pub fn parse_optional<T>(
        &mut self,
        name: &str,
        text: Option<&String>,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> Option<Option<T>> {
        match text.map(|text| text.trim()).filter(|text| !text.is_empty()) {
            None => Some(None),
            Some(text) => self.parse(name, text, parse).map(Some),
        }
    }

    /// All of them.
    pub fn lines(&self) -> &[String] {
        &self.0
    }
}

/// The process's environment, read once.
#[derive(Debug, Default)]
pub struct Environment(HashMap<String, String>);

impl Environment {
    /// The variables given, as a map.
    pub fn new(variables: impl IntoIterator<Item = (String, String)>) -> Self {
        Self(variables.into_iter().collect())
    }

    /// The variable's value; an empty one counts as unset.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(|value| value.trim()).filter(|value| !value.is_empty())
    }

    /// A secret: `NAME` itself or the contents of the file that `NAME_FILE` names (white space at its ends
    /// does not count). Secrets have no flag, since a command line is seen by others.
    pub fn secret(&self, name: &str, problems: &mut Problems) -> Option<Secret> {
        let file_name = format!("{name}_FILE");
        match (self.get(name), self.get(&file_name)) {
            (Some(_), Some(_)) => {
                problems.add(name, format_args!("set it or {file_name}, not both"));
                None
            }
            (Some(value), None) => Some(Secret::new(value)),
            (None, Some(path)) => match std::fs::read_to_string(path) {
                Ok(text) if text.trim().is_empty() => {
                    problems.add(&file_name, "the file is empty");
                    None
                }
                Ok(text) => Some(Secret::new(text.trim())),
                Err(error) => {
                    problems.add(&file_name, error);
                    None
                }
            },
            (None, None) => None,
        }
    }
}

/// Longer than anything here lasts, and short enough to be added to any time.
const LONGEST_DURATION: Duration = Duration::from_hours(24 * 3650);

/// A duration with its unit: `250ms`, `2s`, `10m`, `72h`; at most ten years.
pub fn duration(text: &str) -> Result<Duration, String> {
    text.parse::<jiff::SignedDuration>()
        .ok()
        .and_then(|signed| Duration::try_from(signed).ok())
        .filter(|duration| *duration <= LONGEST_DURATION)
        .ok_or_else(|| format!("{text:?} is no duration such as 250ms, 2s, 10m or 72h"))
}

/// As [`duration`], but not zero.
pub fn positive_duration(text: &str) -> Result<Duration, String> {
    let value = duration(text)?;
    if value.is_zero() { Err("must be longer than zero".to_owned()) } else { Ok(value) }
}

/// Writes a duration as settings have it, for `/_debug/config`.
pub fn shown_duration<S: serde::Serializer>(value: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    match jiff::SignedDuration::try_from(*value) {
        Ok(duration) => serializer.collect_str(&format_args!("{duration:#}")),
        Err(_) => serializer.collect_str(&format_args!("{value:?}")),
    }
}

/// A number of bytes: `1048576`, `256MiB`, `10GiB`.
pub fn bytes(text: &str) -> Result<u64, String> {
    text.parse::<ByteSize>()
        .map(|size| size.0)
        .map_err(|_| format!("{text:?} is no size such as 256MiB or 10GiB"))
}

/// A whole number from `least` to `most`.
pub fn number(least: u64, most: u64) -> impl Fn(&str) -> Result<u64, String> {
    move |text| match text.parse() {
        Ok(value) if (least..=most).contains(&value) => Ok(value),
        _ => Err(format!("{text:?} is no whole number from {least} to {most}")),
    }
}

/// As [`number`], for things held in memory.
pub fn count(least: usize, most: usize) -> impl Fn(&str) -> Result<usize, String> {
    move |text| match text.parse() {
        Ok(value) if (least..=most).contains(&value) => Ok(value),
        _ => Err(format!("{text:?} is no whole number from {least} to {most}")),
    }
}

/// A file that can be read.
pub fn readable_file(text: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(text);
    match std::fs::File::open(&path) {
        Ok(_) => Ok(path),
        Err(error) => Err(format!("{text:?} cannot be read: {error}")),
    }
}

/// `true` or `false`.
pub fn boolean(text: &str) -> Result<bool, String> {
    text.parse().map_err(|_| format!("{text:?} is neither true nor false"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_parse_or_say_what_they_should_be() {
        assert_eq!(duration("400ms"), Ok(Duration::from_millis(400)));
        assert_eq!(duration("72h"), Ok(Duration::from_hours(72)));
        assert!(duration("999999999h").is_err());
        assert!(duration("2").is_err() && duration("-2s").is_err() && duration("soon").is_err());
        assert!(positive_duration("0s").is_err());
        assert_eq!(bytes("10GiB"), Ok(10 << 30));
        assert_eq!(bytes("1024"), Ok(1024));
        assert!(bytes("lots").is_err() && bytes("-1").is_err());
        assert_eq!(number(1, 20)("20"), Ok(20));
        assert!(number(1, 20)("21").is_err() && number(1, 20)("2.0").is_err() && count(1, 2)("-1").is_err());
        assert!(boolean("yes").is_err());
    }

    #[test]
    fn all_problems_are_kept_and_empty_means_left_out_only_where_it_may_be() {
        let mut problems = Problems::default();
        assert_eq!(problems.parse("PORT", "x", number(0, 65_535)), None);
        assert_eq!(problems.parse("BIND_ADDR", " ", |text| Ok(text.to_owned())), None);
        assert_eq!(
            problems.parse_optional("NATS_URL", Some(&String::new()), |text| Ok(text.to_owned())),
            Some(None)
        );
        assert_eq!(problems.lines().len(), 2);
        assert!(problems.lines()[0].starts_with("PORT: "));
    }

    #[test]
    fn a_secret_comes_from_its_variable_or_from_a_file_but_not_from_both() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "from file\n").unwrap();
        let path = file.path().to_str().unwrap().to_owned();
        let mut problems = Problems::default();
        let environment = |pairs: &[(&str, &str)]| {
            Environment::new(pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())))
        };
        let both = environment(&[("T", "a"), ("T_FILE", &path)]);
        assert!(both.secret("T", &mut problems).is_none() && problems.lines().len() == 1);
        assert_eq!(
            environment(&[("T_FILE", &path)]).secret("T", &mut problems).unwrap().expose(),
            "from file"
        );
        assert_eq!(environment(&[("T", " a ")]).secret("T", &mut problems).unwrap().expose(), "a");
        assert!(environment(&[("T_FILE", "/no/such")]).secret("T", &mut problems).is_none());
        assert_eq!(problems.lines().len(), 2);
    }
}
