use std::collections::BTreeMap;

use parlour_core::{AgentType, Fault, FaultKind, Payload};
use serde::Serialize;
use serde_json::Value;

use crate::{Error, IntoPayload, Json};

/// How the data types begin that mean something to every worker.
pub(crate) const RESERVED: &str = "parlour.";
pub(crate) const DESCRIBE: &str = "parlour.describe";
pub(crate) const SAVE_STATE: &str = "parlour.save_state";
pub(crate) const LOAD_STATE: &str = "parlour.load_state";
pub(crate) const PASSIVATE: &str = "parlour.passivate";

/// What an agent type says of itself.
#[derive(Debug, Default)]
pub(crate) struct About {
    pub(crate) version: String,
    pub(crate) metadata: BTreeMap<String, String>,
    pub(crate) schemas: BTreeMap<String, Schemas>,
}

/// JSON Schemas of a call and of its reply.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Schemas {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) schema: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) reply_schema: Option<Value>,
}

#[derive(Serialize)]
struct Description<'a> {
    version: &'a str,
    agent_type: &'a str,
    handles: Vec<Handles<'a>>,
    metadata: &'a BTreeMap<String, String>,
}

#[derive(Serialize)]
struct Handles<'a> {
    data_type: &'a str,
    #[serde(flatten)]
    schemas: Schemas,
}

impl About {
    /// The answer to `parlour.describe` for calls of these data types; an empty one means all others.
    pub(crate) fn describe<'a>(
        &'a self,
        agent_type: &'a AgentType,
        data_types: impl Iterator<Item = &'a str>,
    ) -> Result<Payload, Error> {
        let mut data_types: Vec<_> = data_types.collect();
        data_types.sort_unstable();
        let handles = data_types.into_iter().map(|data_type| Handles {
            data_type,
            schemas: self.schemas.get(data_type).cloned().unwrap_or_default(),
        });
        Json(Description {
            version: &self.version,
            agent_type: agent_type.as_str(),
            handles: handles.collect(),
            metadata: &self.metadata,
        })
        .into_payload()
    }
}

/// Why a reserved call is not answered.
pub(crate) fn unanswered(agent_type: &AgentType, data_type: &str) -> Fault {
    match data_type {
        SAVE_STATE | LOAD_STATE => {
            let detail = format!("{agent_type} has no handler for {data_type}");
            Fault::new(FaultKind::Invalid, detail)
                .hint("give the agent `on_save_state` and `on_load_state`")
        }
        _ => {
            let detail = format!("{data_type} is reserved, and unknown to this worker");
            Fault::new(FaultKind::Invalid, detail)
                .hint("name the data type otherwise, or use a worker of a later version")
        }
    }
}
