//! The keeper without a store: what it does in each situation that the store can be in.

use super::*;
use crate::{config::NetworkConfig, lease, store::lease::SubnetRequest};

const OURS: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 1);
const NEW: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 9);
const THEIRS: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 50);
const HOUR: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(86_400);
const CLAIM_TTL: Duration = Duration::from_secs(30);
const TIMES: Times = Times { lease_ttl: DAY, renew_margin: HOUR, claim_ttl: CLAIM_TTL };
const LEASE: LifetimeId = 7;
const CLAIM: LifetimeId = 8;
const CREATED: i64 = 100;
const NEW_CLAIM: Claim = Claim { public_ip: NEW, lifetime: Some(88) };
const CLAIM_NEW: Action = Action::Claim { address: NEW, wait: true };
const CONFIRMED: LeaseEvent = LeaseEvent::Confirmed { expires_in: Some(DAY) };

fn held() -> Held {
    let config = NetworkConfig::parse(r#"{"Network":"10.5.0.0/16"}"#).unwrap();
    Held {
        subnet: "10.5.1.0/24".parse().unwrap(),
        created: true,
        key: "10.5.1.0-24".to_owned(),
        lifetime: Some(LEASE),
        created_at: Some(CREATED),
        claim: Claim { public_ip: OURS, lifetime: Some(CLAIM) },
        request: SubnetRequest::any(config),
    }
}

/// A keeper with its clock.
struct Test {
    keeper: Keeper,
    now: Instant,
}

impl Test {
    fn new(held: Held) -> Self {
        let now = Instant::now();
        let has_lifetimes = held.lifetime.is_some() || held.claim.lifetime.is_some();
        let mut keeper = Keeper::new(held, TIMES, has_lifetimes, now);
        // Claims are fresh unless a test needs another one.
        keeper.claim_at = now + CLAIM_TTL / 3;
        Self { keeper, now }
    }

    fn next(&mut self, observation: Observation) -> Action {
        self.keeper.next(observation, self.now)
    }

    /// Reads `record` at revision 200, with our claim in place.
    fn read(&mut self, record: Option<LeaseRecord>) -> Action {
        let claim = self.keeper.held.claim.lifetime;
        self.next(Observation::Read { revision: 200, record, claim })
    }

    /// Reads our record with another claim on our address, or none.
    fn read_claim(&mut self, claim: Option<LifetimeId>) -> Action {
        self.next(Observation::Read { revision: 200, record: Some(ours()), claim })
    }

    fn renewed(&mut self) -> Action {
        self.next(Observation::Renewed(Some(DAY)))
    }

    fn taken(&mut self, held: Held) {
        assert_eq!(self.next(Observation::Taken(Box::new(held))), Action::Read);
    }

    fn away(&mut self) -> Action {
        self.next(Observation::Failed(StoreError::away("read", "no answer")))
    }

    fn events(&mut self) -> Vec<LeaseEvent> {
        mem::take(&mut self.keeper.events)
    }

    /// Reads our record and renews its lease.
    fn confirm(&mut self) -> Action {
        assert_eq!(self.read(Some(ours())), Action::Renew(LEASE));
        let action = self.renewed();
        assert_eq!(self.events(), [CONFIRMED]);
        action
    }
}

fn record(value: &str, created: i64, lifetime: Lifetime) -> LeaseRecord {
    let version = Version { created: Some(created), modified: created, lifetime };
    LeaseRecord::parse("10.5.1.0-24", value.as_bytes(), version)
}

fn record_of(holder: Ipv4Addr, created: i64, lifetime: LifetimeId) -> LeaseRecord {
    record(&lease::value(holder), created, Lifetime::Limited(lifetime))
}

fn ours() -> LeaseRecord {
    record_of(OURS, CREATED, LEASE)
}

fn other_has_our_address() -> Observation {
    let (holder, key) = ("on host b".to_owned(), "k".to_owned());
    Observation::Failed(StoreError::SamePublicIp { public_ip: OURS, holder, key })
}

fn lost_reason(events: &[LeaseEvent]) -> &str {
    match events {
        [LeaseEvent::Lost { why }] => why,
        other => panic!("not one lost lease: {other:?}"),
    }
}

#[test]
fn a_lease_is_renewed_half_way_and_its_claim_more_often() {
    let mut test = Test::new(held());
    let start = test.now;
    let claim_at = start + CLAIM_TTL / 3;
    assert_eq!(test.confirm(), Action::Wait { until: Some(claim_at), changed_after: Some(200) });
    test.now = claim_at;
    assert_eq!(test.next(Observation::Due), Action::RenewClaim(CLAIM));
    let wait = test.next(Observation::ClaimRenewed(true));
    let claim_at = claim_at + CLAIM_TTL / 3;
    assert_eq!(wait, Action::Wait { until: Some(claim_at), changed_after: Some(200) });
    // Suspended past the renewal: the claim first, then the lease, and its time counts from the request.
    test.now = start + DAY / 2;
    assert_eq!(test.next(Observation::Due), Action::RenewClaim(CLAIM));
    assert!(matches!(test.next(Observation::ClaimRenewed(true)), Action::Wait { .. }));
    assert_eq!(test.next(Observation::Due), Action::Renew(LEASE));
    test.renewed();
    assert_eq!(test.events(), [CONFIRMED]);
    assert_eq!(test.keeper.expires, Some(test.now + DAY));
}

#[test]
fn renewals_keep_a_margin() {
    assert_eq!(TIMES.renew_after(DAY), 12 * HOUR);
    assert_eq!(Times { renew_margin: 20 * HOUR, ..TIMES }.renew_after(DAY), 4 * HOUR);
    assert_eq!(TIMES.renew_after(Duration::from_secs(4)), Duration::from_millis(400));
}

#[test]
fn a_removed_record_is_acquired_again_and_its_old_lifetime_revoked() {
    let mut test = Test::new(held());
    test.confirm();
    assert_eq!(test.next(Observation::Changed), Action::Read);
    assert_eq!(test.read(None), Action::TakeSubnet);
    test.taken(Held { lifetime: Some(77), created_at: Some(300), ..held() });
    assert!(matches!(&test.events()[..], [LeaseEvent::Reacquired { why, .. }] if why.contains("removed")));
    assert_eq!(test.keeper.revoked, [LEASE]);
    assert_eq!(test.read(Some(record_of(OURS, 300, 77))), Action::Renew(77));
}

#[test]
fn a_removed_record_that_cannot_be_written_is_a_lost_lease() {
    let mut test = Test::new(held());
    for _ in 0..3 {
        assert_eq!(test.read(None), Action::TakeSubnet);
        let denied = StoreError::Denied { operation: "write".to_owned(), why: "permission".to_owned() };
        assert!(matches!(test.next(Observation::Failed(denied)), Action::Wait { changed_after: None, .. }));
        assert_eq!(test.next(Observation::Due), Action::Read);
    }
    // Reported once: peers have no record of this host.
    assert!(lost_reason(&test.events()).contains("permission"));
}

#[test]
fn a_record_of_another_host_is_left_alone_and_another_subnet_taken() {
    // A lifetime that another host uses is not revoked.
    for (created, lifetime, revoked) in [(300, 99, vec![LEASE]), (CREATED, LEASE, Vec::new())] {
        let mut test = Test::new(held());
        test.confirm();
        test.next(Observation::Changed);
        assert_eq!(test.read(Some(record_of(THEIRS, created, lifetime))), Action::TakeSubnet);
        let to = "10.5.2.0/24".parse().unwrap();
        test.taken(Held { subnet: to, lifetime: Some(77), ..held() });
        assert!(matches!(&test.events()[..], [LeaseEvent::Moved { to: moved, why, .. }]
            if *moved == to && why.contains("192.168.77.50")));
        assert_eq!(test.keeper.revoked, revoked);
    }
}

#[test]
fn without_a_free_subnet_the_lease_is_lost_and_each_new_reason_reported_once() {
    let mut test = Test::new(held());
    for (why, reported) in [("held by 1", true), ("held by 1", false), ("held by 2", true)] {
        assert_eq!(test.read(Some(record_of(THEIRS, 300, 99))), Action::TakeSubnet);
        test.next(Observation::Failed(StoreError::Conflict(why.to_owned())));
        let events = test.events();
        assert_eq!(!events.is_empty(), reported);
        assert!(!reported || lost_reason(&events) == why, "{events:?}");
        test.next(Observation::Due);
    }
    // The wanted subnet is free again.
    test.read(Some(record_of(THEIRS, 300, 99)));
    test.taken(held());
    assert!(matches!(test.events()[..], [LeaseEvent::Reacquired { .. }]));
}

#[test]
fn an_overwritten_record_is_restored_at_most_once_a_second() {
    let vxlan = r#"{"PublicIP":"192.168.77.1","BackendType":"vxlan"}"#;
    let overwritten = |lifetime| [record("{\"Public", CREATED, lifetime), record(vxlan, CREATED, lifetime)];
    let lifetimes = [Lifetime::Limited(LEASE), Lifetime::Unlimited];
    for (record, why) in
        lifetimes.into_iter().flat_map(|lifetime| overwritten(lifetime).into_iter().zip(["Public", "vxlan"]))
    {
        let mut test = Test::new(held());
        let restore = Action::Restore(record.version);
        assert_eq!(test.read(Some(record.clone())), restore);
        test.taken(held());
        let events = test.events();
        assert!(
            matches!(&events[..], [LeaseEvent::Reacquired { why: found, .. }] if found.contains(why)),
            "{events:?}"
        );
        let restore_at = test.now + RESTORE_INTERVAL;
        let wait = Action::Wait { until: Some(restore_at), changed_after: None };
        assert_eq!(test.read(Some(record.clone())), wait);
        test.now = restore_at;
        assert_eq!(test.next(Observation::Due), Action::Read);
        assert_eq!(test.read(Some(record)), restore);
        assert_eq!(test.next(Observation::Changed), Action::Read);
    }
}

#[test]
fn a_record_that_another_backend_created_with_our_address_is_restored() {
    let mut test = Test::new(held());
    test.confirm();
    let theirs = record(r#"{"PublicIP":"192.168.77.1","BackendType":"vxlan"}"#, 300, Lifetime::Limited(99));
    test.next(Observation::Changed);
    assert_eq!(test.read(Some(theirs.clone())), Action::Restore(theirs.version));
    let denied = StoreError::Denied { operation: "write".to_owned(), why: "permission".to_owned() };
    test.next(Observation::Failed(denied));
    assert!(lost_reason(&test.events()).contains("vxlan"), "peers skip the record");
}

#[test]
fn a_new_record_that_cannot_be_read_is_left_alone_until_it_is_removed() {
    let mut test = Test::new(held());
    let garbage = || Some(record("garbage", 300, Lifetime::Unlimited));
    for _ in 0..2 {
        assert!(matches!(test.read(garbage()), Action::Wait { changed_after: Some(200), .. }));
        test.next(Observation::Changed);
    }
    assert!(lost_reason(&test.events()).contains("garbage"), "reported once");
    assert_eq!(test.read(None), Action::TakeSubnet);
}

#[test]
fn a_record_that_an_operator_makes_a_reservation_stays_one() {
    let mut test = Test::new(held());
    let reservation = record(&lease::value(OURS), CREATED, Lifetime::Unlimited);
    assert!(matches!(test.read(Some(reservation)), Action::Wait { .. }));
    assert_eq!(test.keeper.revoked, [LEASE]);
    assert_eq!(test.events(), [LeaseEvent::Confirmed { expires_in: None }]);
    // Removed, it becomes a lease.
    test.next(Observation::Changed);
    assert_eq!(test.read(None), Action::TakeSubnet);
}

#[test]
fn an_unreachable_store_is_reported_once_with_the_rest_of_the_lease() {
    let mut test = Test::new(held());
    test.confirm();
    test.now += HOUR;
    for _ in 0..3 {
        assert!(matches!(test.away(), Action::Wait { changed_after: None, .. }));
        test.next(Observation::Due);
    }
    let events = test.events();
    let [LeaseEvent::Unconfirmed { expires_in, .. }] = &events[..] else { panic!("{events:?}") };
    assert_eq!(*expires_in, Some(DAY - HOUR));
    test.keeper.claim_at = test.now + CLAIM_TTL;
    test.confirm();
}

#[test]
fn another_kind_of_failure_is_another_report() {
    let mut test = Test::new(held());
    test.confirm();
    let denied = || StoreError::Denied { operation: "read".to_owned(), why: "permission".to_owned() };
    let mut fail = |error| {
        test.next(Observation::Failed(error));
        test.next(Observation::Due);
        test.events().iter().map(|event| format!("{event:?}")).collect::<String>()
    };
    assert!(fail(StoreError::away("read", "no answer")).contains("no answer"));
    assert_eq!(fail(StoreError::away("read", "another text")), "");
    assert!(fail(denied()).contains("permission"));
    assert_eq!(fail(denied()), "");
    assert!(fail(StoreError::away("read", "no answer")).contains("no answer"));
}

#[test]
fn a_claim_that_ended_is_made_again_and_one_that_another_host_made_is_respected() {
    let mut test = Test::new(held());
    assert_eq!(test.read_claim(None), Action::Claim { address: OURS, wait: false });
    let claim = Claim { public_ip: OURS, lifetime: Some(88) };
    assert_eq!(test.next(Observation::Claimed(claim)), Action::Read);
    assert_eq!(test.keeper.held.claim, claim);
    let mut test = Test::new(held());
    for _ in 0..2 {
        assert_eq!(test.read_claim(Some(99)), Action::Claim { address: OURS, wait: false });
        let wait = Action::Wait { until: Some(test.now + CLAIM_TTL / 3), changed_after: None };
        assert_eq!(test.next(other_has_our_address()), wait);
        assert_eq!(test.next(Observation::Due), Action::Read);
    }
    assert!(matches!(&test.events()[..], [LeaseEvent::Superseded { why }] if why.contains("on host b")));
}

#[test]
fn a_record_follows_its_host_to_another_address() {
    let mut test = Test::new(held());
    test.confirm();
    assert_eq!(test.next(Observation::AddressChanged(NEW)), Action::Read);
    assert_eq!(test.read(Some(ours())), Action::Renew(LEASE));
    assert_eq!(test.renewed(), CLAIM_NEW);
    assert_eq!(test.events(), [], "nothing is confirmed while the record has the old address");
    assert_eq!(test.next(Observation::Claimed(NEW_CLAIM)), Action::MoveRecord(NEW_CLAIM));
    assert_eq!(test.next(Observation::RecordMoved(true)), Action::Read);
    assert_eq!(test.keeper.revoked, [CLAIM]);
    test.keeper.claim_at = test.now + CLAIM_TTL;
    assert_eq!(test.read(Some(record_of(NEW, CREATED, LEASE))), Action::Renew(LEASE));
    test.renewed();
    assert_eq!(test.events(), [LeaseEvent::Readdressed { public_ip: NEW }, CONFIRMED]);
}

#[test]
fn a_move_whose_answer_was_lost_is_completed() {
    let mut test = Test::new(held());
    test.confirm();
    test.next(Observation::AddressChanged(NEW));
    assert_eq!(test.read(Some(record_of(NEW, CREATED, LEASE))), CLAIM_NEW);
    assert_eq!(test.next(Observation::Claimed(NEW_CLAIM)), Action::Read);
    assert_eq!(test.keeper.held.claim, NEW_CLAIM);
}

#[test]
fn a_host_whose_record_is_not_its_own_takes_another_subnet_under_its_new_address() {
    let mut test = Test::new(held());
    test.next(Observation::AddressChanged(NEW));
    // Its old address has been claimed by another host.
    test.read_claim(Some(99));
    assert_eq!(test.next(other_has_our_address()), CLAIM_NEW);
    test.next(Observation::Claimed(NEW_CLAIM));
    assert_eq!(test.next(Observation::RecordMoved(false)), Action::TakeSubnet);
    assert_eq!((test.keeper.held.public_ip(), test.keeper.held.lifetime), (NEW, None));
}

#[test]
fn a_failed_move_gives_the_new_claim_back_and_is_tried_again() {
    let mut test = Test::new(held());
    test.confirm();
    test.next(Observation::AddressChanged(NEW));
    test.read(Some(ours()));
    test.renewed();
    test.next(Observation::Claimed(NEW_CLAIM));
    assert!(matches!(test.away(), Action::Wait { .. }));
    assert_eq!(test.keeper.revoked, [88]);
    assert_eq!(test.next(Observation::Due), Action::Read);
    test.read(Some(ours()));
    assert_eq!(test.renewed(), CLAIM_NEW);
}

#[test]
fn a_store_without_lifetimes_leaves_conflicts_to_the_operator() {
    let claim = Claim { public_ip: OURS, lifetime: None };
    let mut test = Test::new(Held { lifetime: None, claim, created_at: None, ..held() });
    let read = |test: &mut Test, holder| {
        let value = lease::value(holder);
        test.read(Some(LeaseRecord::parse("10.5.1.0-24", value.as_bytes(), Version::default())))
    };
    assert_eq!(read(&mut test, OURS), Action::Wait { until: None, changed_after: Some(200) });
    assert_eq!(test.events(), [LeaseEvent::Confirmed { expires_in: None }]);
    test.next(Observation::Changed);
    assert_eq!(test.read(None), Action::TakeSubnet);
    test.taken(test.keeper.held.clone());
    assert!(matches!(test.events()[..], [LeaseEvent::Reacquired { .. }]));
    assert!(matches!(read(&mut test, THEIRS), Action::Wait { .. }));
    assert!(lost_reason(&test.events()).contains("192.168.77.50"));
    test.next(Observation::AddressChanged(NEW));
    assert_eq!(read(&mut test, NEW), CLAIM_NEW, "written before a restart");
}

#[test]
fn a_lease_of_an_earlier_run_is_in_doubt_until_it_is_claimed_and_confirmed() {
    let now = Instant::now();
    let ends = now + HOUR;
    let unclaimed = Held { created: false, claim: Claim { public_ip: OURS, lifetime: None }, ..held() };
    let mut test = Test { keeper: Keeper::recalled(unclaimed, TIMES, Some(ends), now), now };
    assert!(matches!(test.away(), Action::Wait { changed_after: None, .. }));
    assert!(
        matches!(&test.events()[..], [LeaseEvent::Unconfirmed { expires_in: Some(left), .. }] if *left == HOUR),
        "the rest of the lease, not a whole one"
    );
    test.now += 2 * HOUR;
    // Its end changes nothing by itself: the record may still be there, or be acquired again.
    test.away();
    assert_eq!(test.events(), []);
    // The store is back. Before any write or renewal, the address is claimed, and the claim of the earlier run may have to end.
    assert_eq!(test.read(Some(ours())), Action::Claim { address: OURS, wait: true });
    assert!(matches!(test.away(), Action::Wait { .. }), "away again");
    assert_eq!(test.read(Some(ours())), Action::Claim { address: OURS, wait: true });
    let claim = Claim { public_ip: OURS, lifetime: Some(CLAIM) };
    assert_eq!(test.next(Observation::Claimed(claim)), Action::Read);
    assert_eq!(test.read(Some(ours())), Action::RenewClaim(CLAIM));
    test.next(Observation::ClaimRenewed(true));
    test.confirm();
}

#[test]
fn a_subnet_of_an_earlier_run_that_another_host_has_is_left_to_it() {
    let now = Instant::now();
    let mut test = Test { keeper: Keeper::recalled(held(), TIMES, Some(now + HOUR), now), now };
    let theirs = || Some(record_of(THEIRS, 150, 77));
    assert_eq!(test.read(theirs()), Action::Claim { address: OURS, wait: true });
    let claim = Claim { public_ip: OURS, lifetime: Some(CLAIM) };
    test.next(Observation::Claimed(claim));
    assert_eq!(test.read(theirs()), Action::RenewClaim(CLAIM));
    test.next(Observation::ClaimRenewed(true));
    assert_eq!(test.read(theirs()), Action::TakeSubnet);
    let other = Held { subnet: "10.5.9.0/24".parse().unwrap(), key: "10.5.9.0-24".to_owned(), ..held() };
    test.taken(other);
    assert!(matches!(&test.events()[..], [LeaseEvent::Moved { .. }]));
}
