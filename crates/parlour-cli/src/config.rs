//! Where settings come from: flags over environment over files over defaults, each with its origin.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};

use parlour_core::{Fault, FaultKind};
use parlour_host::{Config, ConfigError};
use toml::Value;

use crate::args::Sources;
use crate::exit::{Code, Failure};

/// Variables that belong to client verbs, or that `parlour worker` gives to the programs it runs.
const OTHER_VARIABLES: [&str; 9] = [
    "PARLOUR_URL",
    "PARLOUR_TOKEN_FILE",
    "PARLOUR_LOG",
    "PARLOUR_KEY",
    "PARLOUR_DATA_TYPE",
    "PARLOUR_ATTEMPT",
    "PARLOUR_CONVERSATION",
    "PARLOUR_CAUSE",
    "PARLOUR_HOPS",
];

/// Where a setting was made.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Origin {
    Default,
    File(PathBuf),
    Variable(String),
    Flag(&'static str),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File(path) => write!(f, "{}", path.display()),
            Self::Variable(name) => f.write_str(name),
            Self::Flag(name) => f.write_str(name),
        }
    }
}

/// The settings of a host, and where each was made.
#[derive(Debug)]
pub(crate) struct Settings {
    pub(crate) config: Config,
    /// What was said but can have no effect.
    pub(crate) warnings: Vec<String>,
    origins: BTreeMap<String, Origin>,
    faults: Vec<Fault>,
}

impl Settings {
    /// Reads everything that `parlour serve` would read here; `flags` are settings of its own flags.
    ///
    /// Everything that is wrong is told at once, with [`Code::BadConfig`].
    pub(crate) fn load(
        sources: &Sources,
        flags: &[(&'static str, &str, String)],
    ) -> Result<Self, Failure> {
        let mut settings = Self::defaults();
        let usual = usual_files(|name| std::env::var_os(name));
        for path in usual.iter().filter(|path| path.is_file()) {
            settings.read_file(path);
        }
        if let Some(path) = &sources.config {
            settings.read_file(path);
        }
        settings.read_environment(std::env::vars_os());
        for (key, value) in &sources.set {
            settings.set(key, value, Origin::Flag("--set"));
        }
        for (flag, key, value) in flags {
            settings.set(key, value, Origin::Flag(flag));
        }
        settings.finish()
    }

    /// Reads one file and nothing else.
    pub(crate) fn of_file(path: &Path) -> Result<Self, Failure> {
        let mut settings = Self::defaults();
        settings.read_file(path);
        settings.finish()
    }

    /// Where the setting of this key was made.
    pub(crate) fn origin(&self, key: &str) -> &Origin {
        self.origins.get(key).unwrap_or(&Origin::Default)
    }

    fn defaults() -> Self {
        Self {
            config: Config::default(),
            warnings: Vec::new(),
            origins: BTreeMap::new(),
            faults: Vec::new(),
        }
    }

    fn finish(self) -> Result<Self, Failure> {
        if self.faults.is_empty() {
            Ok(self)
        } else {
            Err(Failure::all(Code::BadConfig, self.faults))
        }
    }

    fn set(&mut self, key: &str, value: &str, origin: Origin) {
        match self.config.set(key, value) {
            Ok(()) => {
                self.origins.insert(key.to_owned(), origin);
            }
            Err(error) => {
                let fault = Fault::new(FaultKind::Invalid, format!("{origin}: {error}"));
                self.faults.push(fault.hint(match error {
                    ConfigError::UnknownKey { suggestion: Some(meant), .. } => {
                        format!("did you mean `{meant}`?")
                    }
                    _ => format!("`parlour config show` says what `{key}` is for"),
                }));
            }
        }
    }

    fn read_file(&mut self, path: &Path) {
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) => {
                let detail = format!("cannot read {}: {error}", path.display());
                self.faults.push(
                    Fault::new(FaultKind::Invalid, detail)
                        .hint("`parlour config show` says what holds without this file"),
                );
                return;
            }
        };
        let parsed = text.parse::<toml::Table>().map_err(|error| {
            let line = error.span().map_or(0, |span| text[..span.start].matches('\n').count());
            format!("line {}: {}", line + 1, error.message())
        });
        match parsed {
            Ok(table) => self.read_table("", table, path),
            Err(error) => self.faults.push(
                Fault::new(FaultKind::Invalid, format!("{}: {error}", path.display())).hint(
                    "settings are TOML, such as `[limits]` and below it `payload_bytes = \"4MiB\"`",
                ),
            ),
        }
    }

    fn read_table(&mut self, prefix: &str, table: toml::Table, path: &Path) {
        for (name, value) in table {
            let key = if prefix.is_empty() { name } else { format!("{prefix}.{name}") };
            match value {
                Value::Table(table) => self.read_table(&key, table, path),
                value => match plain(&value) {
                    Some(text) => self.set(&key, &text, Origin::File(path.to_owned())),
                    None => self.faults.push(
                        Fault::new(
                            FaultKind::Invalid,
                            format!("{}: `{key}` is neither text, number nor list", path.display()),
                        )
                        .hint("quote the value, or write a list of texts in brackets"),
                    ),
                },
            }
        }
    }

    fn read_environment(&mut self, variables: impl Iterator<Item = (OsString, OsString)>) {
        let known: BTreeMap<String, &str> = Config::SETTINGS
            .iter()
            .map(|setting| (variable(setting.key), setting.key))
            .chain([("PARLOUR_LOG".to_owned(), "server.log")])
            .collect();
        let mut variables: Vec<_> = variables
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value)))
            .filter(|(name, _)| name.starts_with("PARLOUR_"))
            .collect();
        // `PARLOUR_LOG` is the short form, so the full one is read after it and wins.
        variables.sort_by_key(|(name, _)| (name != "PARLOUR_LOG", name.clone()));
        for (name, value) in variables {
            let Some(key) = known.get(&name) else {
                if !OTHER_VARIABLES.contains(&&*name) && !name.starts_with("PARLOUR_META_") {
                    self.warnings.push(unknown_variable(&name, known.keys()));
                }
                continue;
            };
            let value = value.to_string_lossy();
            self.set(key, &value, Origin::Variable(name));
        }
    }
}

/// The variable of a setting: `PARLOUR_LIMITS_PAYLOAD_BYTES` of `limits.payload_bytes`.
fn variable(key: &str) -> String {
    format!("PARLOUR_{}", key.replace('.', "_").to_ascii_uppercase())
}

/// What to say about a variable that means nothing. One that lacks its section is recognised too.
fn unknown_variable<'a>(name: &str, known: impl Iterator<Item = &'a String>) -> String {
    let distance = |known: &&str| {
        let short = known.splitn(3, '_').nth(2).map(|last| format!("PARLOUR_{last}"));
        let short = short.map_or(usize::MAX, |short| strsim::damerau_levenshtein(name, &short) + 1);
        strsim::damerau_levenshtein(name, known).min(short)
    };
    let names = known.map(String::as_str).chain(OTHER_VARIABLES);
    match names.min_by_key(distance).filter(|known| distance(known) <= 4) {
        Some(meant) => format!("{name} in the environment means nothing; did you mean {meant}?"),
        None => format!("{name} in the environment means nothing"),
    }
}

/// The files that are read without being named, the least important first.
fn usual_files(variable: impl Fn(&str) -> Option<OsString>) -> Vec<PathBuf> {
    let variable = |name| variable(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let user = variable("XDG_CONFIG_HOME").or_else(|| Some(variable("HOME")?.join(".config")));
    let mut files = vec![PathBuf::from("/etc/parlour/parlour.toml")];
    files.extend(user.map(|path| path.join("parlour/parlour.toml")));
    files.push(PathBuf::from("./parlour.toml"));
    files
}

/// A value as it would stand in the environment.
fn plain(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Integer(number) => Some(number.to_string()),
        Value::Float(number) => Some(number.to_string()),
        Value::Boolean(truth) => Some(truth.to_string()),
        Value::Array(items) => Some(items.iter().map(plain).collect::<Option<Vec<_>>>()?.join(",")),
        Value::Datetime(_) | Value::Table(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_variable_is_told_which_was_meant_and_changes_nothing() {
        let mut settings = Settings::defaults();
        let environment = [
            ("PARLOUR_LIMITS_BATHC", "7"),
            ("PARLOUR_LIMITS_HOPS", "3"),
            ("PARLOUR_META_TENANT", "acme"),
            ("PARLOUR_LISTEN", "127.0.0.1:1"),
            ("HOME", "/"),
        ];
        settings.read_environment(environment.into_iter().map(|(n, v)| (n.into(), v.into())));
        assert_eq!(
            settings.warnings,
            [
                "PARLOUR_LIMITS_BATHC in the environment means nothing; did you mean \
              PARLOUR_LIMITS_BATCH?",
                "PARLOUR_LISTEN in the environment means nothing; did you mean \
              PARLOUR_SERVER_LISTEN?"
            ]
        );
        assert_eq!(settings.config.value("limits.hops").as_deref(), Some("3"));
        assert_eq!(settings.origin("limits.hops"), &Origin::Variable("PARLOUR_LIMITS_HOPS".into()));
        assert_eq!(settings.origin("limits.batch"), &Origin::Default);
    }

    #[test]
    fn tables_lists_and_numbers_become_settings() {
        let text = "[server]\nallowed_hosts = ['a', 'b']\n[limits]\nbatch = 7\n";
        let mut settings = Settings::defaults();
        settings.read_table("", text.parse().unwrap(), Path::new("x.toml"));
        let settings = settings.finish().unwrap();
        assert_eq!(settings.config.value("server.allowed_hosts").as_deref(), Some("a,b"));
        assert_eq!(settings.config.value("limits.batch").as_deref(), Some("7"));
        assert_eq!(settings.origin("limits.batch").to_string(), "x.toml");
    }

    #[test]
    fn everything_wrong_with_a_file_is_told_at_once() {
        let text = "[limits]\nbatches = 7\nbatch = 1979-05-27\n[colour]\nred = true\n";
        let mut settings = Settings::defaults();
        settings.read_table("", text.parse().unwrap(), Path::new("x.toml"));
        let failure = settings.finish().unwrap_err();
        assert_eq!(failure.code(), Code::BadConfig);
        assert_eq!(failure.faults().len(), 3);
    }

    #[test]
    fn the_project_is_read_after_the_user_and_the_machine() {
        let files = usual_files(|name| (name == "HOME").then(|| "/home/a".into()));
        let names: Vec<_> = files.iter().map(|path| path.to_str().unwrap()).collect();
        assert_eq!(
            names,
            ["/etc/parlour/parlour.toml", "/home/a/.config/parlour/parlour.toml", "./parlour.toml"]
        );
    }
}
