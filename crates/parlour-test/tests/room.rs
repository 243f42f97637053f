//! What the room in memory promises to the tests that use it.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use parking_lot::Mutex;
use parlour::{Agent, Client, Error, ErrorKind, FaultKind, Payload, State, Worker, WorkerBuilder};
use parlour_test::{Config, Direction, Room};
use tokio::time::{Instant, sleep};

fn echo(room: &Room) -> WorkerBuilder {
    Worker::builder(room.url()).agent("echo", async |message: Payload| message)
}

async fn call(client: &Client) -> Result<Duration, Error> {
    let began = Instant::now();
    client.call("echo", "hello").timeout(Duration::from_secs(60)).await?;
    Ok(began.elapsed())
}

#[tokio::test(start_paused = true)]
async fn a_delayed_worker_answers_as_much_later() {
    let room = Room::open();
    let worker = room.worker(echo(&room)).await.unwrap();
    let client = room.client().await.unwrap();
    assert_eq!(call(&client).await.unwrap(), Duration::ZERO);
    worker.delay(Duration::from_millis(150));
    assert_eq!(call(&client).await.unwrap().as_millis(), 300);
    worker.heal();
    assert_eq!(call(&client).await.unwrap(), Duration::ZERO);
}

#[tokio::test(start_paused = true)]
async fn what_a_partition_held_up_comes_when_it_ends() {
    let room = Room::open();
    let worker = room.worker(echo(&room)).await.unwrap();
    let client = room.client().await.unwrap();
    for direction in [None, Some(Direction::ToHost), Some(Direction::FromHost)] {
        match direction {
            None => worker.partition(),
            Some(direction) => worker.network().partition_one_way(direction),
        }
        let healed = async {
            sleep(Duration::from_secs(3)).await;
            worker.heal();
        };
        let (called, ()) = tokio::join!(call(&client), healed);
        assert_eq!(called.unwrap().as_secs(), 3, "{direction:?}");
    }
    assert_eq!(worker.network().opened(), 1, "the connection outlived it all");
}

#[tokio::test(start_paused = true)]
async fn a_partition_that_lasts_is_taken_for_death_and_the_worker_comes_back() {
    let mut config = Config::default();
    config.set("timeouts.heartbeat", "1s").unwrap();
    let room = Room::with_config(config);
    let worker = room.worker(echo(&room)).await.unwrap();
    let client = room.client().await.unwrap();
    worker.partition();
    let error = call(&client).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Fault(FaultKind::WorkerLost));
    sleep(Duration::from_secs(20)).await;
    worker.heal();
    sleep(Duration::from_secs(10)).await;
    call(&client).await.unwrap();
    assert!(worker.network().opened() > 1);
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_crashed_stays_away_and_one_whose_connection_was_cut_comes_back() {
    let room = Room::open();
    let client = room.client().await.unwrap();
    let worker = room.worker(echo(&room)).await.unwrap();
    worker.cut();
    sleep(Duration::from_secs(10)).await;
    call(&client).await.unwrap();
    worker.crash();
    sleep(Duration::from_secs(60)).await;
    let error = call(&client).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Fault(FaultKind::UnknownAgent));
}

#[tokio::test(start_paused = true)]
async fn a_host_that_died_or_was_shut_down_is_found_again() {
    let room = Room::open();
    let worker = room.worker(echo(&room)).await.unwrap();
    let client = room.client().await.unwrap();
    for crashes in [true, false] {
        if crashes {
            room.crash().await
        } else {
            room.stop().await
        }
        let refused = room.client().await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Connect);
        room.start();
        sleep(Duration::from_secs(10)).await;
        call(&client).await.unwrap();
    }
    worker.drain().await.unwrap();
    let workers = room.get("/v1/workers").await.unwrap();
    assert!(workers.contains(r#""name":"client""#), "{workers}");
    assert!(!workers.contains("echo"), "{workers}");
}

#[tokio::test(start_paused = true)]
async fn a_narrow_line_takes_its_time() {
    let room = Room::open();
    let worker = room.worker(echo(&room)).await.unwrap();
    let client = room.client().await.unwrap();
    worker.network().narrow(Direction::FromHost, 1000, 2000);
    let began = Instant::now();
    client.call("echo", vec![0; 10_000]).await.unwrap();
    assert_eq!(began.elapsed().as_secs(), 10);
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_the_host_refuses_says_so() {
    let room = Room::open();
    let only = |room: &Room| {
        let echo = Agent::stateless().on_call(async |message: Payload| message);
        Worker::builder(room.url()).agent("echo", echo.exclusive())
    };
    let _first = room.worker(only(&room)).await.unwrap();
    let refused = room.worker(only(&room)).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Fault(FaultKind::Conflict));
}

type Heard = Arc<Mutex<Vec<String>>>;

#[tokio::test(start_paused = true)]
async fn what_one_task_sends_at_once_comes_in_the_order_in_which_it_was_sent() {
    let room = Room::open();
    let heard = Heard::default();
    let log = heard.clone();
    let agent = Agent::new(move |_key| log.clone())
        .on_call(async |State(log): State<Heard>, number: String| log.lock().push(number))
        .on_event(async |State(log): State<Heard>, number: String| log.lock().push(number));
    let worker = Worker::builder(room.url()).agent("log", agent).subscribe("log", "log");
    let _worker = room.worker(worker).await.unwrap();
    let client = room.client().await.unwrap();
    let numbers: Vec<_> = (0..500).map(|number| number.to_string()).collect();

    let calls = numbers.iter().map(|number| client.call("log/k", number.as_str()).into_future());
    assert!(join_all(calls).await.iter().all(Result::is_ok));
    assert_eq!(std::mem::take(&mut *heard.lock()), numbers);

    let events =
        numbers.iter().map(|number| client.publish("log/k", number.as_str()).into_future());
    assert!(join_all(events).await.iter().all(Result::is_ok));
    sleep(Duration::from_secs(1)).await;
    assert_eq!(*heard.lock(), numbers);
}
