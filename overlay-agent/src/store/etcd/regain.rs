//! Getting back what was lost: our record where it was removed or spoilt, another subnet where ours is somebody else's, and
//! our record under this host's new address.

use std::{net::Ipv4Addr, time::Duration};

use tokio::time::{Instant, sleep_until};
use tracing::info;

use super::{
    acquire::{Place, put},
    error::EtcdError,
    maintain::Keeper,
    records::Entry,
};
use crate::{
    lease,
    printable::{LONGEST_NAME, printable},
    store::LeaseEvent,
};

/// Our record is put back at most this often.
const PUT_BACK: Duration = Duration::from_secs(1);

impl Keeper {
    /// Writes the lost record again, if the subnet is still free.
    pub(super) async fn retake(&mut self, why: &str) -> Result<(), EtcdError> {
        self.lost = Some(why.to_owned());
        let lease = self.living_lease().await?;
        match self.session.create(&self.place(), self.held.subnet, lease).await? {
            Some(born) => {
                self.held.key = lease::key(self.held.subnet);
                self.held.born = born;
                self.say_retaken(why.to_owned()).await;
                Ok(())
            }
            None => {
                // Either the record is there again, which the next look shows, or one that overlaps it is.
                let (_, record, _) = self.read().await?;
                match record {
                    Some(_) => Ok(()),
                    None => self.move_away(&format!("{why}, and a part of it is somebody else's now")).await,
                }
            }
        }
        // If the record was written and only the answer lost, the next look finds it with this lease.
    }

    /// Writes our record over what somebody has made of it.
    pub(super) async fn put_back(&mut self, entry: &Entry) -> Result<(), EtcdError> {
        let why = format!("its record was overwritten with what cannot be read: {}", shown(&entry.value));
        self.lost = Some(why.clone());
        sleep_until(self.put_back_at).await;
        self.put_back_at = Instant::now() + PUT_BACK;
        let lease = match self.held.lease {
            Some(_) => Some(self.living_lease().await?),
            None => None,
        };
        let key = self.session.keys.record(&entry.key);
        let ours = put(key, lease::value(self.held.public_ip), lease);
        if self.session.replace(&self.place(), entry, ours).await? {
            self.say_retaken(why).await;
        }
        Ok(())
    }

    /// Nobody can say whose the record is: it is left alone, and the subnet is kept until it says more.
    pub(super) async fn say_unreadable(&mut self, entry: &Entry) {
        let why = format!(
            "the record of {} was removed and one written that cannot be read ({}): remove {}, and this host writes its own",
            self.held.subnet,
            shown(&entry.value),
            self.session.keys.record(&entry.key)
        );
        self.lost = Some(why.clone());
        self.report(LeaseEvent::Unheld { why }).await;
    }

    /// Takes another subnet, because ours is somebody else's; with `--subnet` the same one, when it is free.
    pub(super) async fn move_away(&mut self, why: &str) -> Result<(), EtcdError> {
        self.lost = Some(why.to_owned());
        let from = self.held.subnet;
        let held = self.session.take_subnet(&self.place(), self.held.wanted, Some(from)).await?;
        // Nothing of ours hangs on the old etcd lease.
        if let Some(old) = self.held.lease.filter(|old| Some(*old) != held.lease) {
            self.session.revoke(old).await;
        }
        let (to, why) = (held.subnet, why.to_owned());
        self.held = held;
        if from == to {
            self.say_retaken(why).await;
        } else {
            self.lost = None;
            self.trouble = None;
            self.send(LeaseEvent::Moved { from, to, why }).await;
        }
        Ok(())
    }

    /// This host has another address: its claim and its record go there. Where the record is not ours any more
    /// (`may_be_lost`), another subnet is taken there.
    pub(super) async fn follow_address(&mut self, may_be_lost: bool) -> Result<(), EtcdError> {
        let to = *self.public_ip.borrow_and_update();
        let from = self.held.public_ip;
        let owner = self.session.claim(to).await?;
        match self.session.put_under(&self.held, to, owner).await {
            Ok(true) => {
                info!("the lease on {} is under {to} now, no longer under {from}", self.held.subnet);
                self.go_to(to, owner).await;
                Ok(())
            }
            Ok(false) if may_be_lost => {
                self.go_to(to, owner).await;
                let why = self.lost.clone().unwrap_or_else(|| {
                    // The record hangs on it, and is that of the host that has our old address now.
                    self.held.lease = None;
                    format!("another host has {from} now, which was our address")
                });
                self.move_away(&why).await
            }
            refused => {
                self.session.disclaim(owner).await;
                // Either nobody knows whose it is, or somebody wrote it just now: the next look shows what.
                refused.map(drop)
            }
        }
    }

    /// The record is under this host's new address already: the claim follows.
    pub(super) async fn arrive(&mut self) -> Result<(), EtcdError> {
        let to = *self.public_ip.borrow_and_update();
        let owner = self.session.claim(to).await?;
        self.go_to(to, owner).await;
        Ok(())
    }

    async fn go_to(&mut self, public_ip: Ipv4Addr, owner: Option<i64>) {
        self.session.disclaim(self.held.owner).await;
        self.held.public_ip = public_ip;
        self.held.owner = owner;
        self.claim_at = Instant::now();
    }

    /// The etcd lease that we have if it has not ended, else a new one. It is kept for the next attempt: there is never more
    /// than one, however often writing the record fails.
    async fn living_lease(&mut self) -> Result<i64, EtcdError> {
        if let Some(lease) = self.held.lease
            && self.session.keep_alive(lease).await?.is_some()
        {
            return Ok(lease);
        }
        let lease = self.session.grant(self.session.options.lease_ttl).await?;
        self.held.lease = Some(lease);
        Ok(lease)
    }

    async fn say_retaken(&mut self, why: String) {
        self.lost = None;
        self.trouble = None;
        self.send(LeaseEvent::Retaken { subnet: self.held.subnet, why }).await;
    }

    fn place(&self) -> Place<'_> {
        Place { config: &self.held.config, public_ip: self.held.public_ip, owner: self.held.owner }
    }
}

/// The beginning of a value, without what a terminal would obey.
fn shown(value: &[u8]) -> String {
    format!("`{}`", printable(&String::from_utf8_lossy(value), LONGEST_NAME))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_foreign_value_is_shown_short_and_harmless() {
        assert_eq!(shown(b"{\x1b[2J"), "`{\\u{1b}[2J`");
        assert_eq!(shown(b""), "``");
        let long = shown(&[b'x'; 1000]);
        assert!(long.len() < LONGEST_NAME + 10 && long.ends_with("...`"), "{long}");
    }
}
