//! `GET /v1/agents/{type}` asks an agent of the type what it is.

use crate::room::{Channel, Room};
use parlour_core::wire::{Frame, Register};
use parlour_core::{AgentType, CallId, Fault, FaultKind, Key, Payload, Registration};
use serde_json::{Value, json};

/// What the host says of `agent_type`, while `worker` answers what it is asked.
async fn described(
    room: &Room,
    agent_type: &str,
    worker: &mut Channel,
    reply: Result<Payload, Fault>,
) -> (Value, String) {
    let page = get(room, agent_type, "");
    let answer = async {
        let call = worker.next_call().await;
        assert_eq!(&*call.payload.data_type, "parlour.describe");
        worker.send(Frame::Reply(call.id, reply)).await;
        call.target.to_string()
    };
    tokio::join!(page, answer)
}

async fn get(room: &Room, agent_type: &str, headers: &str) -> Value {
    let request = format!(
        "GET /v1/agents/{agent_type} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\
         {headers}\r\n"
    );
    let answer = room.request(&request).await;
    let (_, body) = answer.split_once("\r\n\r\n").unwrap();
    serde_json::from_str(body).unwrap()
}

#[tokio::test(start_paused = true)]
async fn what_an_agent_says_of_itself_is_shown_beside_who_serves_it() {
    let room = Room::open(&[]);
    let mut worker = room.worker("upper").await;
    let says = Ok(Payload::text(r#"{"version": "1.2.0"}"#));
    let (page, target) = described(&room, "upper", &mut worker, says).await;
    assert_eq!(target, "upper/default");
    assert_eq!(page["description"], json!({"version": "1.2.0"}));
    assert_eq!((&page["type"], &page["workers"][0]["name"]), (&json!("upper"), &json!("test")));
    assert_eq!(page.get("undescribed"), None);
}

#[tokio::test(start_paused = true)]
async fn of_a_type_with_single_agents_alone_one_of_these_is_asked() {
    let room = Room::open(&[]);
    let mut worker = room.channel().await;
    let register = Register {
        request: CallId(1),
        agent_type: AgentType::parse("one").unwrap(),
        key: Some(Key::parse("only").unwrap()),
        registration: Registration::default(),
    };
    worker.send(Frame::Register(register)).await;
    assert!(matches!(worker.next().await, Some(Frame::Done(_))));
    let says = Ok(Payload::text("{}"));
    let (page, target) = described(&room, "one", &mut worker, says).await;
    assert_eq!((target.as_str(), &page["description"]), ("one/only", &json!({})));
    assert_eq!(page["instances"], json!(["only"]));
}

#[tokio::test(start_paused = true)]
async fn why_there_is_no_description_is_said() {
    let room = Room::open(&[]);
    let mut worker = room.worker("upper").await;
    let fault = Fault::new(FaultKind::Invalid, "what is that?");
    let (page, _) = described(&room, "upper", &mut worker, Err(fault)).await;
    assert_eq!(
        (&page["description"], &page["undescribed"]),
        (&Value::Null, &json!("what is that?"))
    );

    let (page, _) = described(&room, "upper", &mut worker, Ok(Payload::text("HELLO"))).await;
    assert_eq!(page["description"], Value::Null);
    assert!(page["undescribed"].as_str().unwrap().contains("no JSON"), "{page}");

    let page = get(&room, "upper", "parlour-deadline-ms: 50\r\n").await;
    assert_eq!((&page["type"], &page["description"]), (&json!("upper"), &Value::Null));
    assert!(page["undescribed"].as_str().unwrap().contains("deadline"), "{page}");
}

#[tokio::test(start_paused = true)]
async fn a_type_that_nobody_serves_is_unknown() {
    let room = Room::open(&[]);
    let problem = get(&room, "nobody", "").await;
    assert_eq!((&problem["kind"], &problem["status"]), (&json!("unknown_agent"), &json!(404)));
}
