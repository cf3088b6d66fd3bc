//! How endpoints are checked, as the record of their service says.

use std::ops::RangeInclusive;

use http::uri::PathAndQuery;
use serde::{Deserialize, Serialize};

/// Milliseconds from one health check to the next.
const CHECK_INTERVAL: RangeInclusive<u32> = 100..=3_600_000;
/// Milliseconds that a health check may take.
const CHECK_TIMEOUT: RangeInclusive<u32> = 1..=60_000;
/// Health checks in a row that change the state of an endpoint.
const CHECKS_IN_A_ROW: RangeInclusive<u32> = 1..=100;
/// Longest slow start, in seconds.
const MAX_SLOW_START: u32 = 3600;

/// How the node of an endpoint checks it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HealthCheck {
    /// What is done.
    pub kind: CheckKind,
    /// With HTTP, the path that has to answer with a status from 200 to 399.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// Milliseconds from one check to the next.
    #[serde(default = "default_interval")]
    pub interval_ms: u32,
    /// Milliseconds that a check may take.
    #[serde(default = "default_timeout")]
    pub timeout_ms: u32,
    /// Failed checks in a row after which the endpoint is down.
    #[serde(default = "default_fall")]
    pub fall: u32,
    /// Passed checks in a row after which it is up again.
    #[serde(default = "default_rise")]
    pub rise: u32,
    /// Seconds in which an endpoint that begins to take connections beside others gets to its full share; 0 for at once.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub slow_start_s: u32,
}

/// For `skip_serializing_if`.
fn is_zero(value: &u32) -> bool {
    *value == 0
}

fn default_interval() -> u32 {
    2000
}

fn default_timeout() -> u32 {
    1000
}

fn default_fall() -> u32 {
    3
}

fn default_rise() -> u32 {
    2
}

/// What a health check does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CheckKind {
    /// Connects.
    Tcp,
    /// Connects and requests a path.
    Http,
}

impl HealthCheck {
    /// Fails when a value is outside of its limits.
    pub(in crate::service) fn check(&self) -> Result<(), String> {
        let Self { interval_ms, timeout_ms, fall, rise, slow_start_s, .. } = *self;
        for (name, value, range) in [
            ("interval_ms", interval_ms, CHECK_INTERVAL),
            ("timeout_ms", timeout_ms, CHECK_TIMEOUT),
            ("fall", fall, CHECKS_IN_A_ROW),
            ("rise", rise, CHECKS_IN_A_ROW),
            ("slow_start_s", slow_start_s, 0..=MAX_SLOW_START),
        ] {
            if !range.contains(&value) {
                let (least, most) = range.into_inner();
                return Err(format!("health.{name} is {value}: expected {least} to {most}"));
            }
        }
        match self.path.as_deref() {
            None => Ok(()),
            Some(path) if !path.starts_with('/') => Err("health.path does not start with a slash".to_owned()),
            Some(path) => match path.parse::<PathAndQuery>() {
                Ok(_) => Ok(()),
                Err(error) => Err(format!("health.path is no path of a URL: {error}")),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_have_limits() {
        let check = |members: &str| {
            let json = format!(r#"{{"kind":"http"{members}}}"#);
            serde_json::from_str::<HealthCheck>(&json).unwrap().check()
        };
        assert_eq!(check(""), Ok(()));
        assert_eq!(
            check(r#","path":"/ok?full=1","interval_ms":100,"timeout_ms":60000,"slow_start_s":3600"#),
            Ok(())
        );
        for (members, reason) in [
            (r#","fall":0"#, "health.fall is 0: expected 1 to 100"),
            (r#","rise":101"#, "health.rise is 101"),
            (r#","interval_ms":99"#, "100 to 3600000"),
            (r#","timeout_ms":60001"#, "1 to 60000"),
            (r#","slow_start_s":3601"#, "0 to 3600"),
            (r#","path":"ok""#, "slash"),
            (r#","path":"/a b""#, "no path of a URL"),
        ] {
            let error = check(members).unwrap_err();
            assert!(error.contains(reason), "{members}: {error}");
        }
    }
}
