//! Settings: where they come from, and what is said about wrong ones.

mod common;

use common::parlour;

#[test]
fn an_unknown_key_is_told_with_its_file_and_what_was_meant() {
    let ended = parlour(["serve", "--listen", "127.0.0.1:0"])
        .file("parlour.toml", "[limits]\npayload_byte = \"4MiB\"\n")
        .run()
        .with_code(78);
    assert!(ended.stdout.is_empty());
    assert!(ended.stderr.contains("./parlour.toml"), "{}", ended.stderr);
    assert!(ended.stderr.contains("`limits.payload_byte`"), "{}", ended.stderr);
    assert!(
        ended.stderr.contains("hint: did you mean `limits.payload_bytes`?"),
        "{}",
        ended.stderr
    );
}

#[test]
fn a_wrong_value_is_told_what_one_looks_like() {
    let ended =
        parlour(["config", "show", "--set", "calls.default_timeout=soon"]).run().with_code(78);
    assert!(ended.stderr.contains("--set: `soon`"), "{}", ended.stderr);
    assert!(ended.stderr.contains("30s"), "{}", ended.stderr);
}

#[test]
fn a_file_that_cannot_be_read_is_not_called_bad_toml() {
    let ended = parlour(["config", "check", "none.toml"]).run().with_code(78);
    assert!(ended.stderr.contains("cannot read none.toml"), "{}", ended.stderr);
    assert!(!ended.stderr.contains("TOML"), "{}", ended.stderr);
}

#[test]
fn a_file_that_is_not_toml_is_told_with_its_line() {
    let ended = parlour(["config", "check", "bad.toml"])
        .file("bad.toml", "[limits]\nbatch 7\n")
        .run()
        .with_code(78);
    assert!(ended.stderr.contains("bad.toml: line 2: "), "{}", ended.stderr);
}

#[test]
fn a_named_file_that_is_missing_is_an_error() {
    let ended = parlour(["config", "show", "--config", "none.toml"]).run().with_code(78);
    assert!(ended.stderr.contains("none.toml"), "{}", ended.stderr);
}

#[test]
fn everything_wrong_is_told_at_once_and_in_json_as_problems() {
    let ended = parlour(["--json", "config", "check", "bad.toml"])
        .file("bad.toml", "limit = 1\n[limits]\nbatches = 7\n")
        .run()
        .with_code(78);
    let problems: Vec<serde_json::Value> =
        ended.stderr.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(problems.len(), 2, "{problems:?}");
    assert!(problems.iter().all(|problem| problem["kind"] == "invalid"));
    assert!(ended.stdout.is_empty());
}

#[test]
fn a_flag_beats_the_environment_which_beats_files() {
    let ended = parlour(["config", "show", "--json", "--set", "limits.hops=3"])
        .env("PARLOUR_LIMITS_HOPS", "4")
        .env("PARLOUR_LIMITS_BATCH", "5")
        .file("parlour.toml", "[limits]\nhops = 6\nbatch = 7\nheaders = 8\n")
        .file("config/parlour/parlour.toml", "[limits]\nheaders = 9\njson_depth = 10\n")
        .run()
        .with_code(0);
    let settings = ended.json();
    let of = |key: &str| {
        let setting = settings.as_array().unwrap().iter().find(|s| s["key"] == key).unwrap();
        let text = |field: &str| setting[field].as_str().unwrap().to_owned();
        (text("value"), text("origin"))
    };
    assert_eq!(of("limits.hops"), ("3".into(), "--set".into()));
    assert_eq!(of("limits.batch"), ("5".into(), "PARLOUR_LIMITS_BATCH".into()));
    assert_eq!(of("limits.headers"), ("8".into(), "./parlour.toml".into()));
    assert_eq!(of("limits.json_depth").0, "10");
    assert_eq!(of("limits.connections").1, "default");
}

#[test]
fn the_origin_of_each_setting_is_shown() {
    let ended =
        parlour(["config", "show", "--origin"]).env("PARLOUR_LIMITS_BATCH", "5").run().with_code(0);
    let batch = ended.text().lines().find(|line| line.starts_with("limits.batch ")).unwrap();
    assert!(batch.ends_with("PARLOUR_LIMITS_BATCH"), "{batch}");
}

#[test]
fn an_unknown_variable_is_a_warning_with_what_was_meant() {
    let ended = parlour(["config", "check"]).env("PARLOUR_LIMITS_BATCHS", "5").run().with_code(0);
    assert!(ended.stderr.contains("did you mean PARLOUR_LIMITS_BATCH?"), "{}", ended.stderr);
}

#[test]
fn what_is_no_log_filter_is_refused() {
    let ended = parlour(["serve", "--listen", "127.0.0.1:0", "--memory"])
        .env("PARLOUR_LOG", "warn,a=b=c")
        .run()
        .with_code(78);
    assert!(ended.stderr.contains("PARLOUR_LOG"), "{}", ended.stderr);
}
