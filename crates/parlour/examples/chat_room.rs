//! A chat room: an agent keeps what was said, whoever is there hears it, and a second agent joins in
//! when it is asked something. Start a host with `parlour serve --memory`, then run
//! `cargo run -p parlour --example chat_room`.
#![allow(clippy::print_stdout, reason = "an example shows what it does")]

use std::sync::Mutex;

use parlour::{Agent, AgentError, Client, Cx, Error, Json, PayloadExt, State, Worker};
use serde::{Deserialize, Serialize};

#[derive(Clone, Deserialize, Serialize)]
struct Line {
    who: String,
    text: String,
}

/// What was said in one room.
#[derive(Default)]
struct Room(Mutex<Vec<Line>>);

impl Room {
    fn lines(&self) -> Result<std::sync::MutexGuard<'_, Vec<Line>>, AgentError> {
        Ok(self.0.lock().map_err(|_| "the room is closed")?)
    }
}

/// Keeps a line and tells everybody. One at a time, so that all hear lines in the order they are kept.
async fn say(State(room): State<Room>, cx: Cx, Json(line): Json<Line>) -> Result<(), AgentError> {
    room.lines()?.push(line.clone());
    cx.publish(format!("chat/{}", cx.agent().key), Json(line)).await?;
    Ok(())
}

async fn history(State(room): State<Room>) -> Result<Json<Vec<Line>>, AgentError> {
    Ok(Json(room.lines()?.clone()))
}

/// Hears every line of its room, and answers questions. Its answer belongs to the same conversation.
async fn join_in(cx: Cx, Json(line): Json<Line>) -> Result<(), AgentError> {
    if line.text.ends_with('?') {
        let answer = Line { who: "Sibyl".into(), text: format!("who knows, {}", line.who) };
        let room = format!("room/{}", cx.agent().key);
        cx.call(room, Json(answer)).data_type("say").await?;
    }
    Ok(())
}

/// Says something, and returns once the room has kept it.
async fn speak(client: &Client, room: &str, who: &str, text: &str) -> Result<(), Error> {
    let line = Line { who: who.into(), text: text.into() };
    client.call(room, Json(line)).data_type("say").await?;
    Ok(())
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Error> {
    let url = std::env::var("PARLOUR_URL").unwrap_or_else(|_| "http://127.0.0.1:9000".into());

    let room = Agent::new(|_key| Room::default())
        .on_call_of("say", say)
        .on_call_of("history", history)
        .one_at_a_time();
    let worker = Worker::builder(&url)
        .name("chat room")
        .agent("room", room)
        .agent("sibyl", Agent::stateless().on_event(join_in))
        .subscribe("chat", "sibyl") // lines of the room `lobby` go to `sibyl/lobby`
        .start()
        .await?;

    let (ada, alan) = (Client::connect(&url).await?, Client::connect(&url).await?);
    let mut heard = alan.subscribe("chat").await?;
    speak(&ada, "room/lobby", "Ada", "good evening").await?;
    speak(&ada, "room/lobby", "Ada", "will it rain?").await?;
    for _ in 0..3 {
        let Some(event) = heard.next().await else { break };
        let line: Line = event.payload.json()?;
        println!("{} hears {}: {}", event.topic.source, line.who, line.text);
    }

    let history = ada.call("room/lobby", "").data_type("history").json::<Vec<Line>>().await?;
    println!("{} lines were said in the lobby", history.len());
    let elsewhere = ada.call("room/cellar", "").data_type("history").json::<Vec<Line>>().await?;
    println!("{} lines were said in the cellar", elsewhere.len());
    worker.shutdown().await
}
