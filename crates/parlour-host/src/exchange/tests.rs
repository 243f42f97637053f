use std::sync::Barrier;
use std::thread;

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
