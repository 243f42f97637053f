//! How keys spread over the workers of a type, and which of them move.

use proptest::prelude::*;

use super::{Member, heaviest, minus_log2, mix};
use crate::{AgentId, AgentType, Directory, Key, Registration, WorkerId};

const KEYS: u32 = 1000;

/// Workers of the type `a`, numbered from 1, with these capacities.
fn pool(capacities: &[u16]) -> Directory<u64> {
    let mut room = Directory::default();
    for (id, &capacity) in (1..).zip(capacities) {
        join(&mut room, id, capacity);
    }
    room
}

fn join(room: &mut Directory<u64>, id: u64, capacity: u16) {
    let registration = Registration { capacity, ..Registration::default() };
    let agent_type = AgentType::parse("a").unwrap();
    room.register(WorkerId(id), &id, &agent_type, &registration, 9).unwrap();
}

/// Where each key is.
fn places(room: &Directory<u64>) -> Vec<u64> {
    let agent_type = AgentType::parse("a").unwrap();
    let place = |key: u32| {
        let key = Key::parse(format!("key {key}")).unwrap();
        room.route(&AgentId::new(agent_type.clone(), key)).unwrap().0.0
    };
    (0..KEYS).map(place).collect()
}

/// Whether so many of all keys are what a part `share` of them may be by chance: within five
/// standard deviations of a binomial distribution, and a few keys more for the small ones.
fn is_about(count: usize, share: f64) -> bool {
    let (expected, keys) = (share * f64::from(KEYS), f64::from(KEYS));
    (count as f64 - expected).abs() <= 5.0 * (keys * share * (1.0 - share)).sqrt() + 3.0
}

fn capacities() -> impl Strategy<Value = Vec<u16>> {
    let even = (1..10_usize, 1..100_u16).prop_map(|(count, capacity)| vec![capacity; count]);
    let any = prop::collection::vec(prop_oneof![1..5_u16, 1..1000_u16, Just(u16::MAX)], 1..10);
    prop_oneof![even, any]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn each_worker_has_its_share(capacities in capacities()) {
        let total: f64 = capacities.iter().copied().map(f64::from).sum();
        let places = places(&pool(&capacities));
        for (id, &capacity) in (1..).zip(&capacities) {
            let count = places.iter().filter(|&&place| place == id).count();
            prop_assert!(
                is_about(count, f64::from(capacity) / total),
                "worker {id} of {capacities:?} has {count} keys"
            );
        }
    }

    #[test]
    fn a_worker_that_joins_takes_its_share_and_no_other_key_moves(
        capacities in capacities(),
        capacity in 1..1000_u16,
    ) {
        let mut room = pool(&capacities);
        let before = places(&room);
        let joined = capacities.len() as u64 + 1;
        join(&mut room, joined, capacity);
        let after = places(&room);
        let moved = before.iter().zip(&after).filter(|(was, is)| was != is);
        prop_assert!(moved.clone().all(|(_, is)| *is == joined));
        let total: f64 = capacities.iter().copied().map(f64::from).sum();
        let capacity = f64::from(capacity);
        let count = moved.count();
        prop_assert!(is_about(count, capacity / (total + capacity)), "{count} keys moved");
    }

    #[test]
    fn a_worker_that_leaves_gives_up_its_keys_and_no_other_key_moves(
        capacities in capacities(),
        who in any::<prop::sample::Index>(),
    ) {
        let mut room = pool(&capacities);
        let before = places(&room);
        let left = who.index(capacities.len()) as u64 + 1;
        room.remove(WorkerId(left));
        if capacities.len() > 1 {
            for (was, is) in before.into_iter().zip(places(&room)) {
                prop_assert!(is != left && (is == was || was == left), "from {was} to {is}");
            }
        }
    }

    #[test]
    fn a_worker_that_grows_only_gains_keys(
        capacities in capacities(),
        who in any::<prop::sample::Index>(),
        capacity in 1..u16::MAX,
    ) {
        let mut room = pool(&capacities);
        let before = places(&room);
        let index = who.index(capacities.len());
        let id = index as u64 + 1;
        join(&mut room, id, capacity);
        let grows = capacity >= capacities[index];
        for (was, is) in before.into_iter().zip(places(&room)) {
            prop_assert!(is == was || (if grows { is } else { was }) == id, "from {was} to {is}");
        }
    }

    #[test]
    fn it_does_not_matter_in_which_order_workers_came(
        capacities in capacities(),
        seed in any::<u64>(),
    ) {
        let mut order: Vec<u64> = (1..=capacities.len() as u64).collect();
        order.sort_by_key(|&id| mix(id ^ seed));
        let mut room = Directory::default();
        for id in order {
            join(&mut room, id, capacities[id as usize - 1]);
        }
        prop_assert_eq!(places(&room), places(&pool(&capacities)));
    }

    #[test]
    fn of_equal_capacities_the_greatest_hash_has_the_greatest_score(
        count in 1..20_usize,
        key in any::<u64>(),
        capacity in 1..u16::MAX,
    ) {
        let members: Vec<_> = (1..=count as u64)
            .map(|id| Member { id: WorkerId(id), peer: (), capacity, capabilities: vec![] })
            .collect();
        let by_hash = members.iter().max_by_key(|member| member.rank(key)).unwrap();
        prop_assert_eq!(heaviest(&members, key).unwrap().id, by_hash.id);
    }

    #[test]
    fn logarithms_are_right(hash in 1..u64::MAX) {
        let right = (64.0 - (hash as f64).log2()) * (1_u64 << 32) as f64;
        prop_assert!((minus_log2(hash) as f64 - right).abs() < 64.0);
    }
}

#[test]
fn the_ends_of_the_logarithm_are_right() {
    assert_eq!([0, 1, 1 << 63, u64::MAX].map(minus_log2), [64 << 32, 64 << 32, 1 << 32, 1]);
}

/// `docs/protocol.md` describes the choice, and `conformance/test_pools.py` makes it as described.
#[test]
fn the_choice_is_the_same_everywhere() {
    let even = places(&pool(&[1, 1, 1]));
    let uneven = places(&pool(&[1, 2, 5]));
    assert_eq!((&even[..12], &uneven[..12]), (&EVEN[..], &UNEVEN[..]));
}

const EVEN: [u64; 12] = [3, 3, 3, 2, 2, 1, 1, 2, 2, 3, 1, 3];
const UNEVEN: [u64; 12] = [3, 3, 3, 2, 3, 1, 2, 2, 2, 3, 3, 3];
