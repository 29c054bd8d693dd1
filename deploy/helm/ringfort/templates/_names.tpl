{{- define "ringfort.labels" -}}
app.kubernetes.io/name: ringfort
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "ringfort.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag }}
{{- end -}}

{{- define "ringfort.serves" -}}
ringfort/serves: "true"
{{- end -}}

{{/* What Ray counts of a pod that takes a gateway. */}}
{{- define "ringfort.gateway" -}}
ringfort_gateway
{{- end -}}

{{/* What Ray's processes ask each other for. */}}
{{- define "ringfort.token" -}}
- {name: RAY_AUTH_MODE, value: token}
- name: RAY_AUTH_TOKEN
  valueFrom:
    secretKeyRef: {name: {{ .Values.secretName }}, key: rayToken}
{{- end -}}
