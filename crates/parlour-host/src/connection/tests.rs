use std::sync::Arc;

use parlour_core::{AgentType, Principal, Registration};

use super::*;
use crate::Config;
use crate::backbone::Memory;
use crate::channel::native::{NAME, Native};
use crate::http::tasks::Tasks;
use crate::link::WebSocketLink;

#[tokio::test]
async fn a_task_that_ends_before_its_time_leaves_no_peer_behind() {
    let exchange = Exchange::new(Arc::new(Config::default()));
    let (peer, inbox) = exchange.join(NAME, Principal::ANONYMOUS);
    let durable = Durable::new(&exchange, &Tasks::default(), Arc::new(Memory::new(1)));
    let mut connection =
        Connection::<WebSocketLink<Native>>::new(exchange.clone(), durable, peer.clone(), inbox);
    let name = exchange.name_session(&peer);
    connection.name = Some(name.clone());
    let upper = AgentType::parse("upper").unwrap();
    exchange.register(&peer, &upper, &Registration::default()).unwrap();
    assert!(exchange.knows(&peer) && exchange.session(&name, &peer).is_some());

    let task = tokio::spawn(async move {
        let _connection = connection;
        panic!("a bug");
    });
    assert!(task.await.unwrap_err().is_panic());
    assert!(!exchange.knows(&peer));
    assert!(exchange.session(&name, &peer).is_none());
    assert!(!exchange.directory().serves_any(peer.id));
}
