//! Names of services and of their endpoints.

use std::{fmt, str::FromStr, sync::Arc};

use serde::{Deserialize, Serialize};

use crate::store::RecordError;

/// Longest label of a DNS name in bytes (RFC 1035 section 2.3.4).
const LONGEST_LABEL: usize = 63;

/// The name of a service: `shop/web` is the service `web` in the namespace `shop`, in DNS `web.shop.svc.<domain>`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ServiceName {
    // Shared: each endpoint has the name of its service, in several places.
    namespace: Arc<str>,
    name: Arc<str>,
}

impl ServiceName {
    /// Fails when a part is no DNS label: letters in lower case, digits and hyphens, at most 63 (RFC 1123 section 2.1).
    pub fn new(namespace: &str, name: &str) -> Result<Self, RecordError> {
        let [namespace, name] = [label("namespace", namespace)?, label("name", name)?].map(Arc::from);
        Ok(Self { namespace, name })
    }

    /// The namespace.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// The name inside the namespace.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl fmt::Display for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl TryFrom<String> for ServiceName {
    type Error = RecordError;

    fn try_from(text: String) -> Result<Self, RecordError> {
        text.parse()
    }
}

impl From<ServiceName> for String {
    fn from(name: ServiceName) -> Self {
        name.to_string()
    }
}

impl FromStr for ServiceName {
    type Err = RecordError;

    fn from_str(text: &str) -> Result<Self, RecordError> {
        match text.split_once('/') {
            Some((namespace, name)) => Self::new(namespace, name),
            None => Err(RecordError(
                format!("{text:?} is no service: expected NAMESPACE/NAME, for example shop/web").into(),
            )),
        }
    }
}

/// The name of an endpoint: the node that runs it, and an identifier that is unique on that node.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EndpointName {
    /// The service.
    pub service: ServiceName,
    /// The node.
    pub node: Arc<str>,
    /// The identifier on the node.
    pub id: Arc<str>,
}

impl EndpointName {
    /// Fails when the node or the identifier is no DNS label.
    pub fn new(service: ServiceName, node: &str, id: &str) -> Result<Self, RecordError> {
        let [node, id] = [label("node", node)?, label("endpoint", id)?].map(Arc::from);
        Ok(Self { service, node, id })
    }
}

impl fmt::Display for EndpointName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.service, self.node, self.id)
    }
}

impl FromStr for EndpointName {
    type Err = RecordError;

    fn from_str(text: &str) -> Result<Self, RecordError> {
        let parts: Vec<&str> = text.split('/').collect();
        let [namespace, name, node, id] = parts[..] else {
            return Err(RecordError(
                format!("{text:?} is no endpoint: expected NAMESPACE/NAME/NODE/ID").into(),
            ));
        };
        Self::new(ServiceName::new(namespace, name)?, node, id)
    }
}

/// Checks a DNS label. `what` names it in the error.
pub(crate) fn label<'a>(what: &str, text: &'a str) -> Result<&'a str, RecordError> {
    let is_inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    let is_label = (1..=LONGEST_LABEL).contains(&text.len())
        && text.bytes().all(is_inner)
        && !text.starts_with('-')
        && !text.ends_with('-');
    if is_label {
        return Ok(text);
    }
    let shown: String = text.chars().take(LONGEST_LABEL).collect();
    let expected = "1 to 63 lower-case letters, digits and hyphens, with no hyphen at either end";
    Err(RecordError(format!("the {what} {shown:?} is no DNS label: expected {expected}").into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_dns_labels() {
        let name: ServiceName = "shop/web-1".parse().unwrap();
        assert_eq!(
            (name.namespace(), name.name(), name.to_string().as_str()),
            ("shop", "web-1", "shop/web-1")
        );
        let endpoint: EndpointName = "shop/web/node-a/1".parse().unwrap();
        assert_eq!((&*endpoint.node, &*endpoint.id), ("node-a", "1"));
        assert_eq!(endpoint.to_string(), "shop/web/node-a/1");
        let long = "a".repeat(64);
        for bad in [
            "web",
            "shop/",
            "/web",
            "Shop/web",
            "shop/web.1",
            "shop/-web",
            "shop/web-",
            "a/b/c",
            &format!("a/{long}"),
        ] {
            assert!(bad.parse::<ServiceName>().is_err(), "{bad}");
        }
        for bad in ["shop/web/node", "shop/web/node/", "shop/web/node/a/b", "shop/web/No/a"] {
            assert!(bad.parse::<EndpointName>().is_err(), "{bad}");
        }
    }
}
