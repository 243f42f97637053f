use std::sync::Barrier;
use std::thread;

use parlour_core::{AgentType, Registration};

use super::*;

fn exchange() -> Exchange {
    Exchange::new(Arc::new(Config::default()))
}

#[tokio::test]
async fn nothing_is_registered_once_a_worker_drains_whoever_comes_first() {
    let exchange = exchange();
    let upper = AgentType::parse("upper").unwrap();
    for _ in 0..20_000 {
        let (peer, _inbox) = exchange.join("test", Principal::ANONYMOUS);
        let both = Barrier::new(2);
        thread::scope(|scope| {
            scope.spawn(|| {
                both.wait();
                let _ = exchange.register(&peer, &upper, &Registration::default());
            });
            both.wait();
            exchange.drain(&peer);
        });
        assert!(!exchange.directory().serves_any(peer.id));
        exchange.leave(peer.id);
    }
}

#[tokio::test]
async fn a_call_that_is_given_up_while_it_moves_is_given_up_where_it_went() {
    let exchange = exchange();
    let (from, inbox) = exchange.join("test", Principal::ANONYMOUS);
    let (to, mut inbox_there) = exchange.join("test", Principal::ANONYMOUS);
    drop(inbox);
    let ticket = |id| Ticket { id: CallId(id), to: To::Peer(to.clone()) };

    from.cancel(CallId(1));
    from.moved(&ticket(1));
    assert!(matches!(inbox_there.try_recv(), Ok(Outgoing::Cancel(CallId(1)))));

    from.moved(&ticket(2));
    assert!(inbox_there.try_recv().is_err());
    from.cancel(CallId(2));
    assert!(matches!(inbox_there.try_recv(), Ok(Outgoing::Cancel(CallId(2)))));
}

#[tokio::test]
async fn who_joins_a_host_that_closes_is_closed_too() {
    let exchange = exchange();
    let (_early, mut early) = exchange.join("test", Principal::ANONYMOUS);
    exchange.close();
    let (_late, mut late) = exchange.join("test", Principal::ANONYMOUS);
    for inbox in [&mut early, &mut late] {
        let Ok(Outgoing::Close(close)) = inbox.try_recv() else { panic!("not closed") };
        assert_eq!(close.code, Close::GOING_AWAY);
    }
}
