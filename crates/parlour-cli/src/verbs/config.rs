//! `parlour config`: the settings that `parlour serve` would use here, and what is wrong with them.

use std::path::Path;

use parlour_host::Config;
use serde_json::{Value, json};

use crate::args::{self, ConfigAction, Sources};
use crate::config::Settings;
use crate::exit::{Code, Failure};
use crate::output::{Mode, Output, Table};

pub(crate) fn run(args: &args::Config, output: &Output) -> Result<Code, Failure> {
    match &args.action {
        ConfigAction::Show { origin, sources } => show(*origin, sources, output),
        ConfigAction::Check { file } => check(file.as_deref(), output),
    }
}

fn show(with_origin: bool, sources: &Sources, output: &Output) -> Result<Code, Failure> {
    let settings = Settings::load(sources, &[])?;
    for warning in &settings.warnings {
        output.warn(warning);
    }
    let mut table = if with_origin {
        Table::new(&["KEY", "VALUE", "ORIGIN"])
    } else {
        Table::new(&["KEY", "VALUE", "WHAT FOR"])
    };
    let mut items = Vec::new();
    for setting in Config::SETTINGS {
        let value = settings.config.value(setting.key).unwrap_or_default();
        let origin = settings.origin(setting.key).to_string();
        items.push(json!({
            "key": setting.key,
            "value": value,
            "default": setting.default,
            "least": setting.range.map(|(least, _)| least),
            "most": setting.range.map(|(_, most)| most),
            "doc": setting.doc,
            "origin": origin,
        }));
        let shown = if value.is_empty() { "\"\"".to_owned() } else { value };
        let last = match setting.range {
            _ if with_origin => origin,
            Some((least, most)) => format!("{} From {least} to {most}.", setting.doc),
            None => setting.doc.to_owned(),
        };
        table.row([setting.key.to_owned(), shown, last]);
    }
    output.list(&items, &Value::Array(items.clone()), &table)?;
    Ok(Code::Ok)
}

fn check(file: Option<&Path>, output: &Output) -> Result<Code, Failure> {
    let settings = match file {
        Some(file) => Settings::of_file(file)?,
        None => Settings::load(&Sources::default(), &[])?,
    };
    for warning in &settings.warnings {
        output.warn(warning);
    }
    if output.mode() == Mode::Text {
        output.note("the settings are good");
    } else {
        output.json(&json!({"ok": true, "warnings": settings.warnings}))?;
    }
    Ok(Code::Ok)
}
