use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use parlour_core::wire::Frame;
use parlour_core::{AgentType, CallId};

use super::scripted::call;
use crate::handle::Handle;
use crate::handlers::Handlers;
use crate::instances::{Serve, Served};
use crate::{Agent, AgentError, Payload, PayloadExt};

/// Answers `slow` after 5 s, and all else at once.
async fn echo(message: Payload) -> Result<Payload, AgentError> {
    if message.to_text()? == "slow" {
        tokio::time::sleep(Duration::from_secs(5)).await;
    }
    Ok(message)
}

fn handlers() -> Handlers {
    let (handle, ..) = Handle::new(Duration::from_secs(30));
    let agent_type = AgentType::parse("a").unwrap();
    let served = Served::new(agent_type.clone(), Agent::stateless().on_call(echo));
    let agents = HashMap::from([(agent_type, Arc::new(served) as Arc<dyn Serve>)]);
    Handlers::new(handle, agents, 8)
}

fn begin(handlers: &mut Handlers, id: u64, text: &str) {
    let Frame::Call(call) = call(id, "a/k", text) else { unreachable!() };
    handlers.call(*call, 0).unwrap();
}

#[tokio::test(start_paused = true)]
async fn an_answer_of_a_lost_connection_does_not_answer_a_new_call_of_the_same_number() {
    let mut handlers = handlers();
    begin(&mut handlers, 1, "old");
    // The task ends, and nobody has looked yet.
    tokio::time::sleep(Duration::from_secs(1)).await;
    handlers.abort_calls();
    begin(&mut handlers, 1, "slow");
    assert_eq!(handlers.next().await, None);
    assert_eq!(handlers.next().await, Some((CallId(1), Ok(Payload::text("slow")))));
    assert!(handlers.is_empty());
}
