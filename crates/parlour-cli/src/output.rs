//! What is printed where: data on stdout, everything else on stderr.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};

use anstyle::{AnsiColor, Style};
use parlour_core::{Fault, FaultKind};
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::exit::{Code, Failure};

/// How data is written.
#[derive(Clone, Copy, Debug, Eq, PartialEq, clap::ValueEnum)]
pub(crate) enum Mode {
    /// For people.
    Text,
    /// One JSON document.
    Json,
    /// One JSON document per line and item.
    Jsonl,
}

/// When colours are used.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, clap::ValueEnum)]
pub(crate) enum Color {
    /// On a terminal, unless `NO_COLOR` is set.
    #[default]
    Auto,
    /// Always.
    Always,
    /// Never.
    Never,
}

/// The two streams, and how to write to them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Output {
    mode: Option<Mode>,
    quiet: bool,
    colored_errors: bool,
    colored_data: bool,
}

impl Output {
    pub(crate) fn new(mode: Option<Mode>, quiet: bool, color: Color) -> Self {
        let no_color = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        let colored = |is_terminal: bool| match color {
            Color::Auto => is_terminal && !no_color,
            Color::Always => true,
            Color::Never => false,
        };
        Self {
            mode,
            quiet,
            colored_errors: colored(io::stderr().is_terminal()),
            colored_data: colored(io::stdout().is_terminal()),
        }
    }

    /// How data is to be written.
    pub(crate) fn mode(&self) -> Mode {
        self.mode_or(Mode::Text)
    }

    /// How data is to be written by a verb whose default is not text.
    pub(crate) fn mode_or(&self, default: Mode) -> Mode {
        self.mode.unwrap_or(default)
    }

    /// Writes data as it is, to the last byte.
    pub(crate) fn data(&self, bytes: &[u8]) -> Result<(), Failure> {
        let mut stdout = io::stdout().lock();
        stdout.write_all(bytes).and_then(|()| stdout.flush()).map_err(|error| {
            if error.kind() == io::ErrorKind::BrokenPipe {
                // Whoever read our output has seen enough.
                Failure::silent(Code::Ok)
            } else {
                Failure::new(Code::Failed, format!("cannot write to stdout: {error}"))
            }
        })
    }

    /// Writes one line of text.
    pub(crate) fn line(&self, text: &str) -> Result<(), Failure> {
        self.data(format!("{text}\n").as_bytes())
    }

    /// Writes one JSON document: on one line for `jsonl`, indented for `json`.
    pub(crate) fn json(&self, value: &impl Serialize) -> Result<(), Failure> {
        let text = match self.mode {
            Some(Mode::Json) => serde_json::to_string_pretty(value),
            _ => serde_json::to_string(value),
        };
        let text = text.map_err(|error| Failure::new(Code::Failed, error.to_string()))?;
        self.line(&text)
    }

    /// Writes a list: a table as text, one document as `json`, one line for each item as `jsonl`.
    pub(crate) fn list(
        &self,
        items: &[Value],
        whole: &Value,
        table: &Table,
    ) -> Result<(), Failure> {
        match self.mode() {
            Mode::Text => self.data(table.render(self.colored_data).as_bytes()),
            Mode::Json => self.json(whole),
            Mode::Jsonl => items.iter().try_for_each(|item| self.json(item)),
        }
    }

    /// Says something to the person, unless they asked for quiet.
    pub(crate) fn note(&self, text: &str) {
        if !self.quiet {
            say(text);
        }
    }

    /// Whether a person sees how far something has come.
    pub(crate) fn shows_progress(&self) -> bool {
        !self.quiet && io::stderr().is_terminal()
    }

    /// Shows how far something has come, in place of what was shown before. Nothing wipes it away.
    pub(crate) fn progress(&self, text: &str) {
        let mut stderr = io::stderr().lock();
        let _ = write!(stderr, "\r{text}\u{1b}[K").and_then(|()| stderr.flush());
    }

    /// Says something that scripts wait for, quiet or not.
    pub(crate) fn announce(&self, text: &str) {
        say(text);
    }

    /// Says what is probably not as it was meant.
    pub(crate) fn warn(&self, text: &str) {
        if !self.quiet {
            say(&format!("{} {text}", self.label("warning:", AnsiColor::Yellow)));
        }
    }

    /// Says why a verb failed.
    pub(crate) fn failure(&self, failure: &Failure) {
        for fault in failure.faults() {
            if self.mode() != Mode::Text {
                say(&problem(fault).to_string());
                continue;
            }
            let error = self.label("error:", AnsiColor::Red);
            say(&format!("{error} {}", indented(fault.detail())));
            if fault.may_have_run() && fault.kind() != FaultKind::AgentFailed {
                say("       the agent may have run");
            }
            if let Some(wait) = fault.retry_after_time() {
                say(&format!("       it can be tried again in {wait:?}"));
            }
            if let Some(key) = fault.config_key() {
                let value = fault.limit_value().map(|limit| format!(", which is {limit}"));
                say(&format!(
                    "       the host's setting is {}{}",
                    escape(key),
                    value.unwrap_or_default()
                ));
            }
            if let Some(hint) = fault.hint_text() {
                say(&format!("{} {}", self.label("hint:", AnsiColor::Cyan), escape(hint)));
            }
            if failure.is_of_host() {
                say(&format!("more: parlour explain {}", fault.kind().name()));
            }
        }
    }

    fn label(&self, label: &str, color: AnsiColor) -> String {
        if self.colored_errors {
            let style = Style::new().bold().fg_color(Some(color.into()));
            format!("{style}{label}{style:#}")
        } else {
            label.to_owned()
        }
    }
}

/// A message on stderr. If nobody reads those either, there is nobody to tell.
fn say(text: &str) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// The fault with the fields that an HTTP answer would have.
pub(crate) fn problem(fault: &Fault) -> Value {
    let mut problem = Map::new();
    let mut set = |key: &str, value: Value| problem.insert(key.to_owned(), value);
    set("kind", fault.kind().name().into());
    set("title", fault.kind().title().into());
    set("detail", fault.detail().into());
    set("retryable", fault.is_retryable().into());
    set("may_have_run", fault.may_have_run().into());
    if let Some(hint) = fault.hint_text() {
        set("hint", hint.into());
    }
    if let Some(wait) = fault.retry_after_time() {
        set("retry_after_ms", json!(wait.as_millis() as u64));
    }
    if let Some(key) = fault.config_key() {
        set("config_key", key.into());
    }
    if let Some(limit) = fault.limit_value() {
        set("limit", limit.into());
    }
    Value::Object(problem)
}

/// The text without anything that a terminal would obey or that would reorder what is seen.
pub(crate) fn escape(text: &str) -> Cow<'_, str> {
    let is_unsafe = |c: char| {
        c.is_control()
            || matches!(
                c,
                '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
                    | '\u{2060}'..='\u{2069}' | '\u{feff}'
            )
    };
    if !text.contains(is_unsafe) {
        return Cow::Borrowed(text);
    }
    let mut safe = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        match c {
            '\n' => safe.push_str("\\n"),
            '\r' => safe.push_str("\\r"),
            '\t' => safe.push_str("\\t"),
            c if is_unsafe(c) => {
                let _ = write!(safe, "\\u{{{:x}}}", c as u32);
            }
            c => safe.push(c),
        }
    }
    Cow::Owned(safe)
}

/// A text of several lines, safe for a terminal, with all but the first indented: none of them can
/// pass for a message of our own.
fn indented(text: &str) -> String {
    text.lines().map(escape).collect::<Vec<_>>().join("\n       ")
}

/// Rows under headings, each column as wide as its widest cell.
#[derive(Debug)]
pub(crate) struct Table {
    headings: Vec<&'static str>,
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(crate) fn new(headings: &[&'static str]) -> Self {
        Self { headings: headings.to_vec(), rows: Vec::new() }
    }

    /// Adds a row. What its cells hold may come from anyone, so it is escaped here.
    pub(crate) fn row<S: AsRef<str>>(&mut self, cells: impl IntoIterator<Item = S>) {
        self.rows.push(cells.into_iter().map(|cell| escape(cell.as_ref()).into_owned()).collect());
    }

    fn render(&self, colored: bool) -> String {
        let width = |text: &str| text.chars().count();
        let mut widths: Vec<usize> = self.headings.iter().map(|text| width(text)).collect();
        for row in &self.rows {
            for (column, cell) in widths.iter_mut().zip(row) {
                *column = (*column).max(width(cell));
            }
        }
        let line = |cells: &mut dyn Iterator<Item = &str>| {
            let mut line = String::new();
            for (cell, column) in cells.zip(&widths) {
                let _ = write!(line, "{cell}{}", " ".repeat(column - width(cell) + 2));
            }
            line.truncate(line.trim_end().len());
            line
        };
        let headings = line(&mut self.headings.iter().copied());
        let mut text = if colored {
            let style = Style::new().bold();
            format!("{style}{headings}{style:#}\n")
        } else {
            format!("{headings}\n")
        };
        for row in &self.rows {
            text.push_str(&line(&mut row.iter().map(String::as_str)));
            text.push('\n');
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_terminal_would_obey_is_shown_and_not_obeyed() {
        assert_eq!(escape("\u{1b}[31mred\n"), "\\u{1b}[31mred\\n");
        assert_eq!(escape("a\u{202e}b\u{9b}"), "a\\u{202e}b\\u{9b}");
        assert!(matches!(escape("plain ü ✓"), Cow::Borrowed(_)));
        assert_eq!(indented("a\nhint: b\u{1b}"), "a\n       hint: b\\u{1b}");
    }

    #[test]
    fn columns_of_a_table_line_up() {
        let mut table = Table::new(&["TYPE", "N"]);
        table.row(["a-long-name", "1"]);
        table.row(["x\n", "22"]);
        assert_eq!(table.render(false), "TYPE         N\na-long-name  1\nx\\n          22\n");
    }
}
