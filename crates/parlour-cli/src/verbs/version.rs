//! `parlour version`: what this program is and which protocols it speaks.

use serde_json::json;

use crate::exit::{Code, Failure};
use crate::output::{Mode, Output};

pub(crate) fn run(output: &Output) -> Result<Code, Failure> {
    let version = env!("CARGO_PKG_VERSION");
    if output.mode() == Mode::Text {
        output.line(&format!("parlour {version}"))?;
    } else {
        let protocols = ["parlour.v1", "parlour.v1+json", "autogen-0.1.0"];
        output.json(&json!({"name": "parlour", "version": version, "protocols": protocols}))?;
    }
    Ok(Code::Ok)
}
